"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn


@dataclass(frozen=True)
class Reading:
    """One step, as far as a person wants to know it."""

    step: int
    loss: float
    lr: float
    tokens_per_second: float
    mfu: float | None
    """Fraction of the device's peak; None where the peak is not known."""
    left_s: float
    checkpoint: int | None
    """Step of the last committed checkpoint."""


class Display:
    """Draws readings on a stream. On a terminal one live line, and notes scroll above it."""

    def __init__(self, stream: TextIO, steps: int, every: int) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._steps = steps
        self._every = every
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._closed = False

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.completed:,}[/]/{task.total:,}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[reading]}"),
                console=self._console,
                expand=True,
                # What is printed elsewhere belongs in a log, and not on this terminal.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("train", total=self._steps, reading="starting")
            self._draw(self._progress.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._draw(self._progress.stop)

    def show(self, reading: Reading) -> None:
        """Draw one step; off a terminal only every so many steps, and the first and last."""
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=reading.step, reading=_fields(reading, bold=True)
            )
        elif reading.step in (1, self._steps) or reading.step % self._every == 0:
            self._print(f"step {reading.step:,}/{self._steps:,}  {_fields(reading)}")

    def note(self, text: str, style: str = "") -> None:
        """Print a line that stays, such as an evaluation or a warning."""
        self._print(f"[{style}]{escape(text)}[/]" if style else escape(text))

    def _print(self, text: str) -> None:
        self._draw(lambda: self._console.print(text))

    def _draw(self, act: Callable[[], object]) -> None:
        """Draw, and go on without a terminal that was closed; rich exits at a broken pipe."""
        if self._closed:
            return
        try:
            act()
        except (OSError, SystemExit):
            self._closed = True


def _fields(reading: Reading, bold: bool = False) -> str:
    emphasis: Callable[[str], str] = (lambda t: f"[bold]{t}[/]") if bold else (lambda t: t)
    parts = [
        f"loss {emphasis(f'{reading.loss:.4f}')}",
        f"lr {reading.lr:.2e}",
        f"{reading.tokens_per_second:,.0f} tok/s",
    ]
    if reading.mfu is not None:
        parts.append(f"MFU {reading.mfu:.1%}")
    parts.append(f"left {timedelta(seconds=round(reading.left_s))}")
    if reading.checkpoint is not None:
        parts.append(f"saved @{reading.checkpoint:,}")
    return "  ".join(parts)
