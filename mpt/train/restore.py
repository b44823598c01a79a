"""Where a run goes on from: the copy in memory if it is the newer one, else the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch import Tensor

from mpt.checkpoint.load import restore as restore_from_disk
from mpt.checkpoint.memory import Memory
from mpt.display import Display
from mpt.dist import Ranks
from mpt.launch.attempt import this_attempt
from mpt.log import Journal
from mpt.recipe.model import Model
from mpt.rundir import CHECKPOINTS
from mpt.state import RunState


def restore(
    run_dir: Path,
    tensors: Mapping[str, Tensor],
    model: Model,
    memory: Memory,
    ranks: Ranks,
    *,
    begin: Callable[[], None],
    given_up: Callable[[RunState], bool],
    journal: Journal,
    display: Display,
    terminal: TextIO,
) -> RunState:
    """Fill `tensors` with the newest state that can be trusted, and say where it comes from.

    Args:
        begin: fills the weights where nothing was ever saved and the run does not begin at random.
        given_up: whether a state is of a branch that a rollback has left.
        terminal: is told of damage, by the rank that found it.

    Returns:
        The state to go on from; step 0 if nothing was ever saved.

    Raises:
        CheckpointError: if nothing in memory can be used, and there are checkpoints but none is
            whole, or the newest one is of another model.
    """

    def reject(directory: Path, problems: list[str]) -> None:
        for problem in problems:  # the rank that found it says it: the others do not know
            journal.event("checkpoint_rejected", path=str(directory), why=problem)
            with suppress(OSError):
                print(f"{directory.name} is damaged: {problem}.", file=terminal)
        if ranks.is_first:
            display.note(f"{directory.name} is set aside; falling back to the one before.", "red")

    copy = memory.newest_common()
    if copy is not None and given_up(copy):
        copy = None
    after = -1 if copy is None else copy.step
    state = restore_from_disk(
        run_dir / CHECKPOINTS, tensors, model, ranks, reject=reject, after=after
    )
    source = "disk"
    if state is None and copy is not None:
        state, source = memory.load(copy.step), "memory"
    else:
        memory.forget()
    if state is None:
        begin()
        return RunState()
    if ranks.is_first:
        where = "memory at" if source == "memory" else "the checkpoint of"
        about = {"step": state.step, "samples": state.samples, "source": source}
        journal.event("resumed", attempt=this_attempt(), **about)
        display.note(f"resumed from {where} step {state.step:,}")
    return state
