"""Which token comes next: logits made into odds, and one draw from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_LOOK = 1024
"""Likeliest ids among which a nucleus is sought first: sorting a whole vocabulary is slow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How odds are made of logits. The steps are taken in the order of these fields.

    Names, meanings and order are those of transformers, except that the penalty does not see
    padding and that a temperature of 0 is greedy.
    """

    repetition_penalty: float = 1.0
    """Logits of ids that the text has already are divided by it; negative ones multiplied."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest id always."""
    top_k: int | None = None
    """Draw from the k likeliest ids only, and from those that equal the last of them."""
    top_p: float | None = None
    """Draw from the fewest likeliest ids that have this much of the probability, likewise."""
    min_p: float | None = None
    """Draw from ids that are at least this fraction as likely as the likeliest."""

    def problems(self) -> Iterator[str]:
        """Yield what makes no sense, under the names of the command's options."""
        if not 0.0 <= self.temperature < float("inf"):
            yield f"--temperature {self.temperature} is not 0 (greedy) or a positive number"
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k {self.top_k} leaves no id to draw; it is 1 or more"
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            yield f"--top-p {self.top_p} is not a probability in (0, 1]"
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            yield f"--min-p {self.min_p} is not a fraction in [0, 1]"
        if not 0.0 < self.repetition_penalty < float("inf"):
            said = f"--repetition-penalty {self.repetition_penalty}"
            yield f"{said} is not a positive number; 1 is off"


def draw(
    logits: Tensor, text: Sequence[int], how: Sampling, uniform: float, n_ids: int | None = None
) -> int:
    """Return the id that follows `text`.

    Args:
        logits: (V,), finite, on the CPU.
        uniform: a random number in [0, 1). Ids lie along that interval by their number, not by
            their likelihood: where two are nearly as likely, rounding moves no border but theirs.
        n_ids: draw ids below this only; the tokenizer's size, where the embedding has more rows.
    """
    logits = penalised(logits.double(), text, how.repetition_penalty)[:n_ids]
    if how.temperature == 0:
        return int(logits.argmax())
    border = odds(logits, how).cumsum(-1)
    return int(torch.searchsorted(border, uniform * border[-1], right=True))


def penalised(logits: Tensor, text: Sequence[int], penalty: float) -> Tensor:
    """Return logits (V,), those of ids in `text` made less likely."""
    if penalty == 1.0:
        return logits
    ids = torch.tensor(sorted(set(text)), dtype=torch.int64)
    seen = logits[ids]
    return logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def odds(logits: Tensor, how: Sampling) -> Tensor:
    """Return how likely each id is to be drawn, (V,) fp64, up to a common factor."""
    # The largest becomes 0, so that even a tiny temperature cannot overflow.
    logits = (logits.double() - logits.max()) / how.temperature
    if how.top_k is not None and how.top_k < len(logits):
        logits = _at_least(logits, logits.topk(how.top_k).values[-1], else_=-torch.inf)
    likely = torch.softmax(logits, dim=-1)
    if how.top_p is not None and how.top_p < 1.0:
        likely = _at_least(likely, _least_of_nucleus(likely, how.top_p))
    if how.min_p is not None:
        likely = _at_least(likely, how.min_p * likely.max())
    return likely


def _at_least(values: Tensor, least: Tensor, else_: float = 0.0) -> Tensor:
    return values.masked_fill(values < least, else_)


def _least_of_nucleus(likely: Tensor, top_p: float) -> Tensor:
    """Return the probability of the last id that is needed to have `top_p` together."""
    for n_seen in (_FIRST_LOOK, len(likely)):
        ranked = likely.topk(min(n_seen, len(likely))).values
        before = ranked.cumsum(-1) - ranked  # of all likelier ids; 0 for the first
        if before[-1] >= top_p:
            break
    return ranked[before < top_p][-1]
