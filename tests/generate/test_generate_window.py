"""Laws of what is seen of a text, and of which texts are read together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.generate.window import batches, context_problems, forgets, remarks, window_start
from mpt.recipe.model import Model
from tests.generate.networks import ROPE, SMALL


@settings(deadline=None)
@given(context=st.integers(1, 70))
def test_as_much_is_seen_as_the_context_takes_and_half_of_it_at_least(context: int) -> None:
    for n_tokens in range(1, 5 * context):
        seen = n_tokens - window_start(n_tokens, context)
        assert seen <= context
        assert seen > context // 2 or seen == n_tokens
        assert seen >= 1
        assert (seen == n_tokens) == (n_tokens <= context)


@settings(deadline=None)
@given(context=st.integers(2, 70))
def test_what_is_forgotten_is_never_seen_again_and_little_is_read_twice(context: int) -> None:
    lengths = range(1, 40 * context)
    starts = [window_start(n, context) for n in lengths]
    assert all(before <= after for before, after in pairwise(starts))
    assert [forgets(n, context) for n in lengths[1:]] == [a != b for a, b in pairwise(starts)]
    read = sum(n - window_start(n, context) if forgets(n, context) else 1 for n in lengths)
    assert read <= 3 * len(lengths)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), max_size=30),
    new_tokens=st.integers(1, 60),
    context=st.integers(1, 40),
    most=st.integers(1, 9),
)
def test_texts_that_are_read_together_always_find_room(
    lengths: list[int], new_tokens: int, context: int, most: int
) -> None:
    found = list(batches(lengths, new_tokens, context, most))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert 1 <= len(batch) <= most
        grown = [[lengths[index] + n for n in range(new_tokens)] for index in batch]
        seen = [[n - window_start(n, context) for n in text] for text in grown]
        alike = all(text == seen[0] for text in seen)
        assert alike or all(text[-1] <= context for text in grown)


def test_texts_that_fit_are_read_together_as_far_as_they_may() -> None:
    assert list(batches([5, 9, 1, 7], 4, 12, 3)) == [[0, 1, 2], [3]]
    assert list(batches([5, 10, 1, 10], 4, 12, 3)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("change", [{"alibi": False}, {}])
def test_alibi_and_no_positions_go_beyond_the_trained_length_and_it_is_said(
    change: dict[str, bool],
) -> None:
    model = Model(**(SMALL | change))
    assert not list(context_problems(model, 999))
    assert "beyond the 24" in next(remarks(model, 999, 30))
    assert not list(remarks(model, 24, 24))
    assert "oldest half is forgotten" in next(remarks(model, 24, 25))


def test_rope_and_learned_positions_are_refused_beyond_theirs() -> None:
    learned = Model(**(SMALL | {"alibi": False, "learned_pos_emb": True}))
    assert "--context 25" in next(context_problems(learned, 25))
    assert "RoPE" in next(context_problems(Model(**(SMALL | ROPE)), 25))
    for model in (learned, Model(**(SMALL | ROPE))):
        assert not list(context_problems(model, 24))
        assert list(context_problems(model, 0))
