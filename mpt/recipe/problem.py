"""One thing that is wrong with a recipe: which key, what was seen, what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A complaint about one key. Where the key stands is looked up when it is printed."""

    key: str
    """Dotted path from the root, such as `train.global_batch_size`."""
    what: str
    """A sentence with the values seen."""
    fix: str = ""
    """What would work, with a value where there is one."""

    def __str__(self) -> str:
        said = f"{self.what.removesuffix('.')}; {self.fix}" if self.fix else self.what
        return f"{self.key}: {said}" if self.key else said
