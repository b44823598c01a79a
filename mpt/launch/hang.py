"""When silent ranks count as hung, and what each of them can still say about where it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt.launch.pulse import Beat, Phase
from mpt.launch.stacks import dump_stacks, stack_file
from mpt.recipe.launch import Hang

_ORDER = (
    Phase.START,
    Phase.EVALUATE,
    Phase.SAVE,
    Phase.FIRST_STEP,
    Phase.STEP,
    Phase.END,
)
"""What follows what, among phases with the same number of steps finished."""


@dataclass(frozen=True)
class RankState:
    """What is known of one rank: numbers and text, so that it can travel between nodes."""

    rank: int
    node: str
    phase: Phase
    step: int
    """Steps finished."""
    silent_s: float
    slowest_s: float
    """The longest of its recent phases of this kind."""
    thread: int
    """Identity of its main thread."""
    process: str
    """State of its process, as /proc spells it."""
    dump: str
    """What faulthandler wrote; empty if nothing."""


def rank_states(
    node: str,
    directory: Path,
    pids: Mapping[int, int],
    beats: Mapping[int, Beat],
) -> list[RankState]:
    """Have ranks write their stacks, and return where each of them is.

    Args:
        directory: of the attempt's logs.
        pids: processes to ask, by rank.
        beats: the latest of each of these ranks, or of more.
    """
    now = time.monotonic()
    dumps = dump_stacks(pids, {rank: stack_file(directory, rank) for rank in pids})
    states = []
    for rank, dump in sorted(dumps.items()):
        beat = beats[rank]
        silent = round(silent_s(beat, now), 3)
        slowest = round(beat.slowest_s, 3)
        state = RankState(
            rank, node, beat.phase, beat.step, silent, slowest, beat.thread, dump.process, dump.text
        )
        states.append(state)
    return states


def silent_s(beat: Beat, now: float) -> float:
    """Return the seconds since a rank said something, at `time.monotonic()` `now`."""
    return max(0.0, now - beat.at)


def bound_s(beat: Beat | RankState, cfg: Hang) -> float:
    """Return the seconds that a rank may be silent in what it is doing."""
    if beat.phase == Phase.START:
        return cfg.start_s
    if beat.phase == Phase.FIRST_STEP:
        return cfg.first_step_s
    return max(floor_s(Phase(beat.phase), cfg), cfg.factor * beat.slowest_s)


def floor_s(phase: Phase, cfg: Hang) -> float:
    """Return the least patience with a phase whose bound is learned from the run."""
    match phase:
        case Phase.SAVE | Phase.END:  # the last save is written after the last step
            return cfg.save_s
        case Phase.EVALUATE:
            return cfg.eval_s
        case _:
            return cfg.min_s


def progress(beat: Beat | RankState) -> tuple[int, int]:
    """Return how far a rank has come; of two, the smaller is the one that is waited for."""
    return beat.step, _ORDER.index(Phase(beat.phase))


def overdue(beats: Mapping[int, Beat], now: float, cfg: Hang) -> list[int]:
    """Return the ranks that hang, of those that one node sees.

    A rank that is further than another can only be waiting for it, so the bound of the ones
    furthest behind counts. While rank 0 deletes old checkpoints, in a save that may take long,
    the others wait in a step that should not, and nothing hangs.
    """
    silent = {rank: silent_s(beat, now) for rank, beat in beats.items()}
    return _overdue(beats, silent, cfg)


def hung(states: Collection[RankState], cfg: Hang) -> list[int]:
    """Return the ranks that hang, of all: what looks like it on one node may wait for another."""
    silent = {state.rank: state.silent_s for state in states}
    return _overdue({state.rank: state for state in states}, silent, cfg)


def _overdue(
    beats: Mapping[int, Beat] | Mapping[int, RankState], silent: Mapping[int, float], cfg: Hang
) -> list[int]:
    furthest_behind = min(map(progress, beats.values()), default=None)
    return [
        rank
        for rank, beat in beats.items()
        if progress(beat) == furthest_behind and silent[rank] > bound_s(beat, cfg)
    ]
