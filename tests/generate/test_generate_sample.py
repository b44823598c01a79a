"""Laws of drawing: the odds are transformers', and ids come as often as their odds say."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpt.generate import sample
from mpt.generate.sample import Sampling, draw, odds, penalised


def drawn(logits: list[float], n: int = 2000, n_ids: int | None = None, **how: Any) -> Counter[int]:
    random, sampling = Random(0), Sampling(**how)
    row = torch.tensor(logits)
    return Counter(draw(row, [], sampling, random.random(), n_ids) for _ in range(n))


def theirs(logits: Tensor, text: list[int], how: Sampling) -> Tensor:
    """Return transformers' probabilities, of logits (V,) fp64."""
    process = pytest.importorskip("transformers.generation.logits_process")
    steps: list[Any] = []
    if how.repetition_penalty != 1.0:
        steps.append(process.RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    steps.append(process.TemperatureLogitsWarper(how.temperature))
    if how.top_k is not None:
        steps.append(process.TopKLogitsWarper(how.top_k))
    if how.top_p is not None:
        steps.append(process.TopPLogitsWarper(how.top_p))
    if how.min_p is not None:
        steps.append(process.MinPLogitsWarper(how.min_p))
    ids, scores = torch.tensor([text]), logits[None]
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores[0], dim=-1)


@pytest.mark.parametrize("first_look", [4, 1024])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0, "top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 1.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_p": 0.5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.9, "top_k": 30, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.2},
    ],
)
def test_odds_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], first_look: int
) -> None:
    monkeypatch.setattr(sample, "_FIRST_LOOK", first_look)
    sampling = Sampling(**how)
    random = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = torch.randn(60, generator=random, dtype=torch.float64) * 2
        text = torch.randint(60, (40,), generator=random).tolist()
        ours = odds(penalised(logits, text, sampling.repetition_penalty), sampling)
        torch.testing.assert_close(ours / ours.sum(), theirs(logits, text, sampling))


def test_ids_are_drawn_as_often_as_their_odds_say() -> None:
    shares = torch.tensor([0.1, 0.6, 0.3])
    counts = drawn(shares.log().tolist())
    for token, share in enumerate(shares.tolist()):
        assert counts[token] / 2000 == pytest.approx(share, abs=0.04)


@settings(deadline=None)
@given(uniform=st.floats(0, 1, exclude_max=True))
def test_an_id_of_no_probability_is_never_drawn(uniform: float) -> None:
    logits = torch.tensor([-1e9, 0.0, -1e9, -1e9, 0.5, -1e9])
    assert draw(logits, [], Sampling(), uniform) in (1, 4)
    assert draw(logits, [], Sampling(top_k=1), uniform) == 4


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert drawn([1.0, 2.0, -50.0], n=20, temperature=1e-320).keys() == {1}


def test_zero_temperature_takes_the_likeliest_id_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert draw(logits, [1], Sampling(temperature=0), 0.0) == 1
    assert draw(logits, [1], Sampling(temperature=0, repetition_penalty=2.0), 0.0) == 2
    assert draw(-logits, [0], Sampling(temperature=0, repetition_penalty=4.0), 0.0) == 2


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    assert drawn([0.0, 0.0, 99.0, 99.0], n_ids=2).keys() == {0, 1}
    assert drawn([0.0, 1.0, 99.0], n=3, n_ids=2, temperature=0).keys() == {1}
    assert drawn([0.0, 1.0, 99.0], n=3, n_ids=2, top_k=1).keys() == {1}
    assert draw(torch.zeros(3), [2], Sampling(repetition_penalty=2.0), 0.9, n_ids=2) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"min_p": -0.1}, "--min-p -0.1"),
        ({"min_p": 1.1}, "--min-p 1.1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty nan"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_value(how: dict[str, Any], said: str) -> None:
    assert [problem.startswith(said) for problem in Sampling(**how).problems()] == [True]


def test_what_makes_sense_is_no_problem() -> None:
    edges = Sampling(temperature=0, top_k=1, top_p=1.0, min_p=0.0, repetition_penalty=0.5)
    assert not list(edges.problems())
    assert not list(Sampling(min_p=1.0).problems())
