"""What a model reads of a text that grows: how much of it is seen, and which texts go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpt.recipe.model import Model


def window_start(n_tokens: int, context: int) -> int:
    """Return the first token that is seen of a text of `n_tokens`.

    A text that outgrows the context loses half a context at a time, not a token: what is left
    must be read anew, because what the model made of it had been made with what is forgotten.
    So it is read about twice in all, however long it grows.
    """
    half = max(1, context // 2)
    beyond = max(0, n_tokens - context)
    return -(-beyond // half) * half


def forgets(n_tokens: int, context: int) -> bool:
    """Whether a text that has just become `n_tokens` long loses some of what was seen."""
    return window_start(n_tokens, context) != window_start(n_tokens - 1, context)


def batches(
    lengths: Sequence[int], new_tokens: int, context: int, most: int
) -> Iterator[list[int]]:
    """Yield which texts are read together, at most so many at a time, as indices of `lengths`.

    Texts that never outgrow the context go together, the shorter ones padded. One that may
    outgrow it goes only with those of which as much is seen: they all forget at the same time,
    need no padding, and never take more room than the context.
    """
    alike: dict[int | None, list[int]] = {}
    for index, length in enumerate(lengths):
        fits = length + new_tokens - 1 <= context  # nobody reads the last new token
        seen = None if fits else length - window_start(length, context)
        alike.setdefault(seen, []).append(index)
    for group in alike.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def context_problems(model: Model, context: int) -> Iterator[str]:
    """Yield why a model cannot read `context` tokens at once."""
    if context < 1:
        yield f"--context {context} is not a positive count"
    elif context > model.max_seq_len and (model.rope or model.learned_pos_emb):
        kind = "RoPE" if model.rope else "learned"
        yield (
            f"--context {context} is more than the model's {model.max_seq_len} tokens, "
            f"which its {kind} positions do not go beyond"
        )


def remarks(model: Model, context: int, longest: int) -> Iterator[str]:
    """Yield what is worth knowing of a context, where texts become up to `longest` tokens."""
    if context > model.max_seq_len:
        how = "with ALiBi" if model.alibi else "without positions"
        yield (
            f"a context of {context:,} tokens is beyond the {model.max_seq_len:,} that the model "
            f"was trained on; {how} it can go on, but nothing says how well."
        )
    if longest > context:
        yield (
            f"texts may become {longest:,} tokens long, and the model sees {context:,}: each "
            "time that one outgrows them, the oldest half is forgotten."
        )
