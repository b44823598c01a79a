"""Laws of text: no character comes out broken, nothing of a stop text comes out at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.generate.loop import Options
from mpt.generate.text import Piece, Writer, continue_texts
from mpt.model.network import MPT
from mpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.generate.networks import small

N_IDS = 290
EOD = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["some text, and more of the same text\n" * 9], path, vocab_size=N_IDS)
    return load_tokenizer(path)


def written(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """Return what comes of each id up to a stop text, and of the end."""
    writer, pieces = Writer(tokenizer.token_bytes, stops), []
    for token in ids:
        pieces.append(writer.take(token))
        if writer.stopped:
            return pieces
    return [*pieces, writer.end()]


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return `text` as somebody cuts it who reads it character by character."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_written_text_is_the_whole_text_and_no_character_is_ever_broken(
    tokenizer: Tokenizer, text: str
) -> None:
    pieces = written(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, N_IDS - 1)))
def test_written_text_of_any_ids_is_their_decoded_text(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(written(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_written_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    assert written(tokenizer, tokenizer.encode("é!")) == ["", "é", "!", ""]


def test_a_character_cut_short_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("a\U0001f600")[:-2]
    assert written(tokenizer, half) == ["a", "", "", "\ufffd"]


def test_what_follows_a_stop_text_in_its_own_token_is_no_text() -> None:
    writer = Writer({7: b"a.b\xc3"}.__getitem__, (".",))
    assert [writer.take(7), writer.end()] == ["a", ""]


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("textsom, ", max_size=40),
    stops=st.lists(st.text("texo ", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_ends_before_the_stop_text_that_it_first_holds(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...]
) -> None:
    ids = tokenizer.encode(text)
    pieces = written(tokenizer, ids, stops)
    assert "".join(pieces) == cut(text, stops)
    for n in range(len(pieces)):  # and nothing had to be taken back
        assert cut(text, stops).startswith("".join(pieces[:n]))


@settings(deadline=None)
@given(text=st.text("textsom, ", max_size=40), stop=st.text("texo ", min_size=1, max_size=4))
def test_no_more_is_held_back_than_a_stop_text_could_begin_with(
    tokenizer: Tokenizer, text: str, stop: str
) -> None:
    ids = tokenizer.encode(text)
    writer, so_far = Writer(tokenizer.token_bytes, (stop,)), ""
    for n, token in enumerate(ids, 1):
        so_far += writer.take(token)
        if writer.stopped:
            return
        held = tokenizer.decode(ids[:n]).removeprefix(so_far)
        assert stop.startswith(held)
        assert held != stop


def always(token: int) -> MPT:
    """Return a network that is all but sure of one token, whatever it reads."""
    network = small(vocab_size=N_IDS + 6, no_bias=False)
    final = network.transformer.norm_f
    assert final.bias is not None
    final.weight.data.zero_()
    final.bias.data.zero_()[0] = 1.0
    network.lm_head.weight.data.zero_()
    network.lm_head.weight.data[token, 0] = 99.0
    network.lm_head.weight.data[1, 0] = -99.0  # <unk>
    return network


def pieces_of(
    network: MPT, tokenizer: Tokenizer, prompts: list[list[int]], **asked: Any
) -> list[list[Piece]]:
    options = Options(**({"tokens": 12, "context": 24} | asked))
    found = list(continue_texts(network, tokenizer, prompts, options))
    n_samples = len(prompts) * options.samples
    return [[piece for piece in found if piece.sample == n] for n in range(n_samples)]


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def network() -> MPT:
    """Says printable text mostly, and the end of a document now and then."""
    network = small(vocab_size=N_IDS + 6)
    network.lm_head.weight.data[2:258] *= 0.1  # single bytes
    network.lm_head.weight.data[EOD] *= 2.5
    return network


def test_every_text_ends_once_and_for_one_reason(network: MPT, tokenizer: Tokenizer) -> None:
    prompts = [[n] for n in range(258, 282)]
    texts = pieces_of(network, tokenizer, prompts, samples=2, stop=("te",), batch=7)
    reasons = set()
    for pieces in texts:
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert all(piece.text for piece in pieces[:-1])
        last = pieces[-1]
        reasons.add(last.finish)
        assert (last.n_tokens == 12) or last.finish != "length"
        assert "te" not in joined(pieces)
    assert reasons == {"length", "eod", "stop"}


def test_stop_texts_change_nothing_before_them(network: MPT, tokenizer: Tokenizer) -> None:
    prompts = [[n] for n in range(258, 282)]
    whole = pieces_of(network, tokenizer, prompts)
    stopped = pieces_of(network, tokenizer, prompts, stop=("t ", "e"))
    assert [joined(pieces) for pieces in stopped] == [
        cut(joined(pieces), ("t ", "e")) for pieces in whole
    ]
    for before, after in zip(whole, stopped, strict=True):
        assert after[-1].n_tokens <= before[-1].n_tokens
        assert (after[-1].finish == "stop") == (joined(before) != joined(after))


def test_the_end_of_a_document_is_no_text_and_no_token(tokenizer: Tokenizer) -> None:
    assert pieces_of(always(EOD), tokenizer, [[5]]) == [[Piece(0, "", 0, "eod")]]


def test_an_empty_prompt_begins_a_document(network: MPT, tokenizer: Tokenizer) -> None:
    assert pieces_of(network, tokenizer, [[]]) == pieces_of(network, tokenizer, [[EOD]])


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(always(N_IDS + 1), tokenizer, [[5]])
    assert pieces[0][-1].finish == "length"  # and not a DataError


def test_a_character_that_is_never_finished_is_marked_at_the_length(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("é")[0]
    network = always(lead)
    assert pieces_of(network, tokenizer, [[5]], tokens=1) == [[Piece(0, "\ufffd", 1, "length")]]
