"""The values that travel between floors during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # not at run time: who only looks at a checkpoint's manifest needs no torch
    from torch import Tensor

IGNORE = -100
"""A target that takes no loss; torch's own default for cross-entropy."""


@dataclass(frozen=True)
class Streak:
    """The updates skipped in a row up to now; all zero after one that was applied."""

    n: int = 0
    after_step: int = 0
    """The step before the first of them: the last one with an update."""
    after_samples: int = 0
    """`RunState.samples` after that step."""
    start: int = 0
    """Position in the data where the first of them began."""
    stop: int = 0
    """Position after the last of them."""


@dataclass(frozen=True)
class Vitals:
    """What must be remembered from step to step to judge the next one."""

    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss) of the latest steps whose update was applied, oldest first; all finite."""
    streak: Streak = field(default_factory=Streak)


@dataclass(frozen=True)
class RunState:
    """All that a run is, beside weights and optimizer moments."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    samples: int = 0
    """Position of the next sample in the data: those before it were consumed or passed over."""
    tokens: int = 0
    """Tokens read by steps, over all ranks."""
    vitals: Vitals = field(default_factory=Vitals)
    bad_samples: int = 0
    """Samples that steps skipped because they cannot be trained on; see data.on_bad_sample."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; numbers come back bit for bit."""
        vitals = {
            "losses": [list(pair) for pair in self.vitals.losses],
            "streak": asdict(self.vitals.streak),
        }
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "bad_samples": self.bad_samples,
            "vitals": vitals,
        }

    @classmethod
    def from_json(cls, raw: object) -> RunState:
        """Return the state that `to_json` gave, which may have been through a stranger's hands.

        Raises:
            ValueError: says what is not as it should be.
        """
        names = ("step", "samples", "tokens", "bad_samples")
        content = _mapping(raw, "the state", (*names, "vitals"))
        vitals = _mapping(content["vitals"], "vitals", ("losses", "streak"))
        parts = _mapping(
            vitals["streak"], "streak", ("n", "after_step", "after_samples", "start", "stop")
        )
        streak = Streak(**{key: _count(value, f"streak.{key}") for key, value in parts.items()})
        counts = {key: _count(content[key], key) for key in names}
        state = cls(**counts, vitals=Vitals(_losses(vitals["losses"]), streak))
        steps = [0, *(step for step, _ in state.vitals.losses), state.step + 1]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError("losses are not of ascending steps up to the state's own")
        if streak.n and not streak.after_samples <= streak.start < streak.stop <= state.samples:
            raise ValueError("the streak's data is not before the state's position")
        if streak.after_step + streak.n > state.step or (not streak.n and streak != Streak()):
            raise ValueError("the streak is not one of steps up to the state's own")
        return state


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on."""

    stream: str
    shard: str
    """Path or URL of its file."""
    row: int
    why: str

    def __str__(self) -> str:
        return f"{self.stream}: {self.shard}: row {self.row}: {self.why}"


@dataclass(frozen=True)
class Microbatch:
    """What one rank reads in one forward pass."""

    tokens: Tensor
    """(B, S) int64."""
    targets: Tensor
    """(B, S) int64; IGNORE where no loss is taken."""
    documents: Tensor | None = None
    """(B, S) int64, if documents in a sample do not see each other: which one each token is of."""
    skipped: tuple[BadSample, ...] = ()
    """Samples whose place is empty: it has no targets."""

    def cut(self, length: int) -> Microbatch:
        """Return the same tokens as samples of `length`: (B, S) -> (B S / length, length).

        Every target stays: the last token of a piece has the first of the next as its own.
        """
        documents = self.documents
        return replace(
            self,
            tokens=self.tokens.reshape(-1, length),
            targets=self.targets.reshape(-1, length),
            documents=None if documents is None else documents.view(-1, length),
        )


class Loss(NamedTuple):
    """What one microbatch costs, summed over its target tokens; () fp32 each."""

    objective: Tensor
    """What is minimised: the nats, and what regularises them."""
    nats: Tensor
    """What is reported; it takes no gradient."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, as tensors on the device: reading one waits for it."""

    loss: Tensor
    """() fp32, nats per target token, mean over the global batch."""
    grad_norm: Tensor
    """() fp32, before clipping."""
    applied: Tensor
    """() bool; False if loss or gradient was bad, so the weights were left alone."""
    bad_samples: Tensor
    """() int64, samples of the global batch that were skipped."""


def _mapping(raw: object, name: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping) or set(raw) != set(keys):
        raise ValueError(f"{name} is not a mapping of {', '.join(keys)}")
    return raw


def _count(raw: object, name: str) -> int:
    if type(raw) is not int or not 0 <= raw < 1 << 63:
        raise ValueError(f"{name} is not a count")
    return raw


def _losses(raw: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(raw, (list, tuple)):
        raise ValueError("losses is not a list")
    return tuple(_loss(pair) for pair in raw)


def _loss(pair: object) -> tuple[int, float]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError("losses holds something other than pairs of step and loss")
    step, loss = pair
    if type(loss) is not float or not math.isfinite(loss):
        raise ValueError("losses holds one that is not a finite number")
    return _count(step, "a step of losses"), loss
