"""Laws of mixtures: shares are kept, streams run on over every change, any position costs alike."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpt.data.mixture import Mixture, Phase
from mpt.data.streams import misfit, mixture_of, parts_of
from mpt.recipe.data import Data, Stream
from mpt.recipe.data import Phase as Later
from mpt.recipe.recipe import Recipe
from tests.data.cases import recipe_for

WEIGHTS = st.one_of(st.just(0.0), st.floats(0.001, 1000.0))


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Up to six phases of a few positions each, of up to four streams, some left out."""
    n_streams = draw(st.integers(1, 4))
    weights = st.lists(WEIGHTS, min_size=n_streams, max_size=n_streams).filter(any)
    phases = draw(st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=6))
    starts = [0, *accumulate(length for length, _ in phases)]
    pairs = zip(starts[:-1], (tuple(w) for _, w in phases), strict=True)
    return Mixture(tuple(Phase(*pair) for pair in pairs))


def chosen(mixture: Mixture, positions: Iterable[int]) -> tuple[list[int], list[int]]:
    stream, index = mixture.choose(np.fromiter(positions, np.int64))
    return stream.tolist(), index.tolist()


@given(mixtures())
@settings(deadline=None)
def test_a_stream_runs_on_without_gap_or_repeat_over_every_change_of_mixture(
    mixture: Mixture,
) -> None:
    stream, index = chosen(mixture, range(300))
    for number in range(mixture.n_streams):
        mine = [i for s, i in zip(stream, index, strict=True) if s == number]
        assert mine == list(range(len(mine)))


@given(mixtures(), st.integers(0, 300))
@settings(deadline=None)
def test_what_comes_before_a_position_is_counted_without_going_there(
    mixture: Mixture, position: int
) -> None:
    stream, _ = chosen(mixture, range(position))
    assert mixture.counts(position) == [stream.count(n) for n in range(mixture.n_streams)]


@given(mixtures(), st.lists(st.integers(0, 299), min_size=1, max_size=30))
@settings(deadline=None)
def test_any_positions_may_be_asked_for_in_any_order(mixture: Mixture, asked: list[int]) -> None:
    stream, index = chosen(mixture, range(300))
    wanted = ([stream[p] for p in asked], [index[p] for p in asked])
    assert chosen(Mixture(mixture.phases), asked) == wanted


@given(mixtures())
@settings(deadline=None)
def test_each_phase_has_its_own_shares_to_within_a_sample_per_stream(mixture: Mixture) -> None:
    ends = [*(phase.start for phase in mixture.phases[1:]), mixture.phases[-1].start + 500]
    for phase, end in zip(mixture.phases, ends, strict=True):
        counts = np.subtract(mixture.counts(end), mixture.counts(phase.start))
        wanted = (end - phase.start) * np.array(phase.weights) / sum(phase.weights)
        assert np.abs(counts - wanted).max() <= mixture.n_streams
        for number, weight in enumerate(phase.weights):
            assert weight > 0 or counts[number] == 0
        assert mixture.in_use(phase.start) == np.flatnonzero(phase.weights).tolist()


@given(
    st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=12),
    st.integers(0, 10**12),
    st.integers(1, 500),
)
@settings(max_examples=200, deadline=None)
@example([1.0, 1.0], 0, 1000)
@example([0.001, 1000.0, 0.001], 0, 500)
def test_each_stream_has_its_share_wherever_one_looks(
    weights: list[float], start: int, length: int
) -> None:
    mixture = Mixture.constant(weights)
    stream, index = mixture.choose(np.arange(start, start + length, dtype=np.int64))
    share = np.array(weights) / sum(weights)
    seen = np.cumsum(stream[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, length + 1)[:, None] * share
    slack = length * 2.0**-31  # shares are rounded to 2**-32
    assert np.abs(seen - wanted).max() <= 2 * len(weights) + slack
    for number in range(len(weights)):  # and within a stream nothing is skipped or repeated
        assert (np.diff(index[stream == number]) == 1).all()


def test_the_count_of_a_stream_is_its_share_of_all_positions_before() -> None:
    at = 10**12
    for weight, count in zip((5, 1, 2), Mixture.constant((5, 1, 2)).counts(at), strict=True):
        assert abs(count - at * weight / 8) <= 3 + at * 2.0**-31


@pytest.mark.parametrize("weights", [(1e308, 1e308, 1e308), (5e-324, 5e-324), (1e308, 5e-324, 1)])
def test_weights_of_any_size_make_a_mixture(weights: tuple[float, ...]) -> None:
    counts = Mixture.constant(weights).counts(1 << 33)
    assert sum(counts) == 1 << 33
    assert min(counts) >= 0


def test_a_thousand_phases_cost_little_more_than_one() -> None:
    weights = [(1.0 + k % 7, 2.0, float(k % 3)) for k in range(1000)]
    many = Mixture(tuple(Phase(256_000 * k, w) for k, w in enumerate(weights)))
    positions = np.arange(999 * 256_000 - 512, 999 * 256_000 + 512, dtype=np.int64)
    spent = {}
    for name, mixture in (
        ("one", Mixture(many.phases[:1])),
        ("many", many),
    ) * 2:  # warm, then count
        began = time.process_time()
        for _ in range(100):
            mixture.choose(positions)
        spent[name] = time.process_time() - began
    assert spent["many"] < 20 * spent["one"]  # it is twice, since the batch lies over a change
    stream, index = many.choose(positions)
    assert index[stream == 0][0] == many.counts(int(positions[0]))[0]


STREAMS = {"a": Stream(path="/a"), "b": Stream(path="/b")}


def streams(**measures: Any) -> Data:
    """Streams named by the first letter of each word: a_tokens=5 is a stream a with 5 tokens."""
    parts = {word[0]: {word[2:]: value} for word, value in measures.items()}
    return Data(streams={name: replace(STREAMS[name], **part) for name, part in parts.items()})


def test_tokens_and_repeats_become_shares() -> None:
    sizes = [100, 300]
    by_tokens = mixture_of(streams(a_tokens=10_000, b_tokens=30_000), sizes, 8)
    by_repeats = mixture_of(streams(b_repeats=0.5, a_repeats=2.0), sizes, 8)
    assert by_tokens.phases[0].weights == (10_000, 30_000)
    assert by_repeats.phases[0].weights == (200, 150)
    # Two passes of a and half a pass of b, to the sample that shares are kept to.
    assert by_repeats.counts(350) in ([200, 150], [199, 151])
    assert mixture_of(Data(streams=STREAMS), sizes, 8).phases[0].weights == (1, 1)


def test_a_curriculum_counts_in_samples_and_names_streams() -> None:
    later = (
        Later(from_step=10, weights={"b": 3.0, "a": 1.0}),
        Later(from_step=20, weights={"b": 0.0, "a": 1.0}),
    )
    mixture = mixture_of(Data(streams=STREAMS, curriculum=later), [5, 5], 8)
    assert [(p.start, p.weights) for p in mixture.phases] == [
        (0, (1, 1)),
        (80, (1, 3)),
        (160, (1, 0)),
    ]
    stream, _ = chosen(mixture, range(240))
    assert [sum(stream[k : k + 80]) for k in (0, 80, 160)] == [40, 60, 0]


def test_a_run_s_parts_are_what_it_reads_and_a_misfit_is_said_with_both_numbers() -> None:
    base = recipe_for_streams(streams(a_repeats=2.0, b_repeats=1.0), steps=25)
    sizes = {"a": 50, "b": 100}
    assert parts_of(base, {"a": 50}) is None
    parts = parts_of(base, sizes)
    assert parts is not None
    assert [(p.name, p.share, p.tokens, p.passes) for p in parts] == [
        ("a", 0.5, 1600, 2.0),
        ("b", 0.5, 1600, 1.0),
    ]
    assert str(parts[0]) == "a 50.0% = 1,600 tokens, 2.00 passes"
    assert misfit(base, sizes) is None
    longer = recipe_for_streams(streams(a_repeats=4.0, b_repeats=2.0), steps=25)
    said = misfit(longer, sizes)
    assert said is not None
    assert "ask for 6,400 tokens, but the run reads 3,200 (" in said
    assert "0.5 of what it asks for; train.steps=50 would fit" in said
    assert misfit(recipe_for_streams(longer.data, steps=50), sizes) is None
    by_tokens = recipe_for_streams(streams(a_tokens=6000, b_tokens=2000), steps=50)
    assert "ask for 8,000 tokens, but the run reads 6,400" in str(misfit(by_tokens, {}))
    by_weight = recipe_for_streams(streams(a_weight=9.0), steps=1)
    assert misfit(by_weight, {}) is None
    unsized = parts_of(by_weight, {})
    assert unsized is not None
    assert unsized[0].passes is None


def recipe_for_streams(data: Data, steps: int) -> Recipe:
    """Batches of 8 samples of 16 tokens."""
    recipe = recipe_for(Path("/nowhere"), "/nowhere")
    train = replace(recipe.train, steps=steps, global_batch_size=8)
    return replace(recipe, data=data, train=train)
