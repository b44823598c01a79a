"""Laws of generation: what is drawn, when it stops, and that text never comes out broken."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpt.errors import CheckpointError, UsageError
from mpt.generate import generate, stream_text
from mpt.model.network import MPT
from mpt.recipe.model import Model
from mpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MODEL = Model(d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=50)


class Scripted(nn.Module):
    """Gives the same logits after every text, and remembers how much it was shown."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:  # (1, S) -> (1, S, V)
        self.lengths.append(tokens.shape[1])
        return self.logits.expand(1, tokens.shape[1], -1)


@pytest.fixture(scope="module")
def network() -> MPT:
    torch.manual_seed(0)
    return MPT(MODEL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["some text, and more of the same text\n" * 9], path, vocab_size=290)
    return load_tokenizer(path)


def drawn(logits: list[float], n: int = 2000, **options: Any) -> Counter[int]:
    options = {"temperature": 1.0, "max_new_tokens": n, "context": 1} | options
    return Counter(generate(Scripted(logits), [0], **options))


def test_zero_temperature_takes_the_likeliest_id_after_every_text(network: MPT) -> None:
    ids = [3, 1, 4]
    for token in generate(network, [3, 1, 4], max_new_tokens=8, context=16, temperature=0):
        with torch.inference_mode():
            assert token == network(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)
    assert len(ids) == 3 + 8


def test_the_same_seed_gives_the_same_text_and_another_another(network: MPT) -> None:
    def text(seed: int) -> list[int]:
        return list(generate(network, [1], max_new_tokens=15, context=16, temperature=9, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_ids_are_drawn_as_often_as_their_probability_says() -> None:
    odds = torch.tensor([0.1, 0.6, 0.3])
    counts = drawn(odds.log().tolist())
    for token, share in enumerate(odds.tolist()):
        assert counts[token] / 2000 == pytest.approx(share, abs=0.04)
    sharper = drawn(odds.log().tolist(), temperature=0.5)
    squared = odds.square() / odds.square().sum()
    assert sharper[1] / 2000 == pytest.approx(squared[1].item(), abs=0.04)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert drawn([1.0, 2.0, -50.0], n=20, temperature=1e-300).keys() == {1}


def test_top_k_and_top_p_leave_only_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    assert drawn(logits, top_k=2).keys() == {1, 2}
    assert drawn(logits, top_k=99).keys() == {0, 1, 2, 3}
    assert drawn(logits, top_p=0.51).keys() == {1, 2}  # 0.5 alone is not enough
    assert drawn(logits, top_p=0.49).keys() == {1}
    assert drawn(logits, top_p=1e-9).keys() == {1}  # never none
    assert drawn(logits, top_p=1.0).keys() == {0, 1, 2, 3}


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    assert drawn([0.0, 0.0, 99.0, 99.0], n_ids=2).keys() == {0, 1}
    assert drawn([0.0, 1.0, 99.0], n=3, n_ids=2, temperature=0).keys() == {1}


def test_the_end_of_document_stops_and_is_not_yielded() -> None:
    ids = list(generate(Scripted([0.0, 0.0, 0.0]), [1], max_new_tokens=999, context=4, eod_id=2))
    assert 2 not in ids
    assert len(ids) < 999


def test_an_empty_prompt_begins_a_new_document() -> None:
    model = Scripted([0.0, 9.0])
    ids = generate(model, [], max_new_tokens=2, context=4, eod_id=0, temperature=0)
    assert list(ids) == [1, 1]
    assert model.lengths == [1, 2]


def test_the_model_reads_no_more_than_its_context() -> None:
    model = Scripted([0.0, 9.0])
    list(generate(model, [0, 0, 0], max_new_tokens=4, context=5, temperature=0))
    assert model.lengths == [3, 4, 5, 5]


def test_each_id_comes_as_soon_as_it_is_known() -> None:
    model = Scripted([0.0, 9.0])
    ids = generate(model, [0], max_new_tokens=4, context=5)
    next(ids)
    assert len(model.lengths) == 1
    assert not torch.is_inference_mode_enabled()


def test_generation_uses_no_dropout_and_leaves_the_mode_as_it_was() -> None:
    model = MPT(Model(**(vars(MODEL) | {"resid_pdrop": 0.9}))).train()
    first = list(generate(model, [1], max_new_tokens=5, context=16, temperature=0))
    assert list(generate(model, [1], max_new_tokens=5, context=16, temperature=0)) == first
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"max_new_tokens": -1}, "-1 new tokens"),
        ({"context": 0}, "0 of context"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"prompt_ids": [0], "max_new_tokens": 1, "context": 4}
    with pytest.raises(UsageError, match=said):
        list(generate(Scripted([0.0, 0.0]), **(arguments | options)))


def test_a_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        list(generate(Scripted([0.0, float("nan")]), [0], max_new_tokens=1, context=4))


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_streamed_text_is_the_whole_text_and_no_character_is_ever_broken(
    tokenizer: Tokenizer, text: str
) -> None:
    pieces = list(stream_text(tokenizer.encode(text), tokenizer))
    assert "".join(pieces) == text
    assert all(pieces)


@given(ids=st.lists(st.integers(0, 289)))
def test_streamed_text_of_any_ids_is_their_decoded_text(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(stream_text(ids, tokenizer)) == tokenizer.decode(ids)


def test_a_character_is_streamed_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    seen = []

    def watched() -> Any:
        for token in tokenizer.encode("é!"):
            seen.append(token)
            yield token

    stream = stream_text(watched(), tokenizer)
    assert next(stream) == "é"
    assert len(seen) == 2  # two bytes, and not yet what follows
    assert next(stream) == "!"


def test_a_character_cut_short_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("a\U0001f600")[:-2]
    assert list(stream_text(half, tokenizer)) == ["a", "\ufffd"]
