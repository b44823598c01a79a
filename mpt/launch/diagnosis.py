"""A hang in words: who is stuck where, and who only waits for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from mpt.launch.hang import RankState, bound_s, floor_s, progress
from mpt.launch.pulse import Phase
from mpt.launch.stacks import GONE, STOPPED, TRACED, UNINTERRUPTIBLE, ZOMBIE, Frame, parse_stacks
from mpt.recipe.launch import Hang

MOST_NAMED = 4
"""Groups of stuck ranks that are described; of further ones there is a count."""

_OWN = re.compile(r"^(?:.*/)?(mpt/(?:[a-z_]+/){0,2}[a-z_]+\.py)$")
_LIBRARY = re.compile(r"/(?:site-packages|dist-packages|lib/python3\.\d+)/((?!site-packages/).+)$")

_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/rendezvous.py",
)
"""Where a rank waits for others. Not all of torch.distributed: FSDP also computes."""

_AUTOGRAD = "torch/autograd/graph.py"
"""Where the main thread waits while autograd's threads run the backward pass on a GPU."""

_THREAD_WAITS = ("threading.py", "queue.py", "concurrent/futures/_base.py")

_DEVICE_WAITS = (("mpt/train/watch.py", "settle"), ("mpt/evaluate.py", "evaluate"))
"""Where the host reads what a GPU computed, and so waits for whomever its GPU waits for."""

_PLUMBING = ("mpt/dist.py", "mpt/train/pace.py")
"""Our own files that do not say what a collective is for."""

_SAVING = "mpt/checkpoint/save.py"

_HELD = {
    STOPPED: "was stopped by a signal (SIGSTOP)",
    TRACED: "is held by a debugger",
    UNINTERRUPTIBLE: "is in a wait for a disk or a device that cannot be interrupted",
    ZOMBIE: "has ended unseen",
    GONE: "has ended unseen",
}

_PLURAL = {"is": "are", "was": "were", "has": "have", "gave": "gave"}


@dataclass(frozen=True)
class _Finding:
    """What a rank's stacks say."""

    kind: Literal["stuck", "collective", "device"]
    what: str
    """If it is stuck, a verb and how; else where it waits."""


def diagnose(states: Collection[RankState], cfg: Hang) -> str:
    """Return who is stuck and who waits, without the last full stop."""
    if not states:
        return "no rank could say where it is"
    findings = {state.rank: _finding(state) for state in states}
    stuck = [state for state in states if findings[state.rank].kind == "stuck"]
    waiting = [state for state in states if findings[state.rank].kind != "stuck"]
    if not stuck:
        return _all_wait(waiting, findings, cfg)
    stuck.sort(key=lambda state: (state.silent_s <= bound_s(state, cfg), progress(state)))
    several_nodes = len({state.node for state in states}) > 1
    parts = []
    for group in _groups(stuck, lambda state: (findings[state.rank].what, _when(state))):
        who = _ranks(group)
        if several_nodes:
            who += f" on {', '.join(sorted({state.node for state in group}))}"
        verb, how = findings[group[0].rank].what.split(" ", 1)
        verb = verb if len(group) == 1 else _PLURAL[verb]
        parts.append(f"{who} {verb} {how} {_when(group[0])}, {_silence(group, cfg)}")
    if len(parts) > MOST_NAMED:
        parts[MOST_NAMED:] = [f"{len(parts) - MOST_NAMED} more groups of ranks are stuck elsewhere"]
    them = "it" if len(stuck) == 1 else "them"
    for group in _groups(waiting, lambda state: findings[state.rank]):
        finding = findings[group[0].rank]
        what = f"in {finding.what}" if finding.kind == "collective" else f"through {finding.what}"
        parts.append(f"{_ranks(group)} {_wait(group)} for {them} {what}")
    return "; ".join(parts)


def stuck_ranks(states: Iterable[RankState]) -> list[int]:
    """Return the ranks that wait for nobody: the cause is among them, if it is in a rank."""
    return [state.rank for state in states if _finding(state).kind == "stuck"]


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Return ranks as a person lists them: "rank 1", "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {', '.join(spans)}"


def _all_wait(waiting: list[RankState], findings: dict[int, _Finding], cfg: Hang) -> str:
    """Nobody is stuck in Python: then it is what lies between the ranks."""
    groups = _groups(waiting, lambda state: (findings[state.rank], _when(state)))
    parts = []
    for group in groups:
        finding = findings[group[0].rank]
        who = "all ranks" if len(groups) == 1 and len(group) > 1 else _ranks(group)
        what = f"in {finding.what}" if finding.kind == "collective" else f"for {finding.what}"
        parts.append(f"{who} {_wait(group)} {what} {_when(group[0])}, {_silence(group, cfg)}")
    if len(groups) == 1:
        cause = "it is the network, or a GPU that does not finish"
    else:
        cause = "their collectives do not match, or it is the network"
    return f"{'; '.join(parts)}; no rank is stuck: {cause}"


def _finding(state: RankState) -> _Finding:
    frames = _frames_that_count(state)
    at = f" in {_place(frames)}" if frames else ""
    if state.process in _HELD:
        return _Finding("stuck", f"{_HELD[state.process]}{at}")
    if not frames:
        begun = state.phase != Phase.START
        return _Finding("stuck", "gave no stack" if begun else "has not begun: it gave no stack")
    called, caller = _split(frames)
    if any(_short(frame.file) in _COLLECTIVES for frame in called):
        return _Finding("collective", f"a collective called from {_site(caller)}")
    if (_short(frames[0].file), frames[0].function) in _DEVICE_WAITS:
        return _Finding("device", f"its GPU, read at {_site(frames[0])}")
    return _Finding("stuck", f"is stuck{at}")


def _frames_that_count(state: RankState) -> tuple[Frame, ...]:
    """Return the main thread's frames, innermost first; before them those it waits for."""
    threads = parse_stacks(state.dump)
    if not threads:
        return ()
    # Before its first beat the main thread is not known: it is the oldest.
    identity = state.thread if state.thread in threads else list(threads)[-1]
    main = threads.pop(identity)
    innermost = _short(main[0].file) if main else ""
    if innermost == _AUTOGRAD:
        for frames in threads.values():
            saving = any(_short(frame.file) == _SAVING for frame in frames)
            if not saving and any(_short(frame.file) in _COLLECTIVES for frame in frames):
                return frames + main
    if innermost in _THREAD_WAITS:
        room = _room(main)
        for frames in threads.values():
            if room and _room(frames) == room:
                return frames + main
    return main


def _split(frames: tuple[Frame, ...]) -> tuple[tuple[Frame, ...], Frame]:
    """Return the first frame of ours that says what is being done, after those that it called.

    The outermost of all counts as it if there is none.
    """
    for i, frame in enumerate(frames):
        if _OWN.match(frame.file) and _short(frame.file) not in _PLUMBING:
            return frames[:i], frame
    return frames, frames[-1]


def _place(frames: tuple[Frame, ...]) -> str:
    """Name the innermost line, and the line of ours that it was called from."""
    _, caller = _split(frames)
    place = _site(frames[0])
    return place if caller == frames[0] else f"{place}, called from {_site(caller)}"


def _room(frames: tuple[Frame, ...]) -> str:
    """Return the folder of the innermost frame of ours: data, checkpoint, ..."""
    own = (match for frame in frames if (match := _OWN.match(frame.file)))
    return next((match[1].rpartition("/")[0] for match in own), "")


def _site(frame: Frame) -> str:
    return f"{_short(frame.file)}:{frame.line} ({frame.function})"


def _short(file: str) -> str:
    """Return a path from its package on."""
    match = _OWN.match(file) or _LIBRARY.search(file)
    return match[1] if match else "/".join(file.split("/")[-2:])


def _when(state: RankState) -> str:
    match state.phase:
        case Phase.START:
            return "while starting"
        case Phase.FIRST_STEP:
            return f"in step {state.step + 1}, its first, which compiles"
        case Phase.STEP:
            return f"in step {state.step + 1}"
        case Phase.SAVE:
            return f"in the save of step {state.step}"
        case Phase.EVALUATE:
            return f"in the evaluation after step {state.step}"
        case _:
            return f"after the last step, {state.step}"


def _silence(group: list[RankState], cfg: Hang) -> str:
    """Say how long the most silent of them has been silent, and how long it may be."""
    worst = max(group, key=lambda state: state.silent_s)
    bound = f"the bound is {_seconds(bound_s(worst, cfg))}"
    if worst.phase not in (Phase.START, Phase.FIRST_STEP) and worst.slowest_s:
        kinds = {Phase.SAVE: "save", Phase.EVALUATE: "evaluation batch"}
        kind = kinds.get(worst.phase, "step")
        slowest, floor = _seconds(worst.slowest_s), _seconds(floor_s(worst.phase, cfg))
        bound += f": {cfg.factor:g} x the slowest recent {kind} of {slowest}, at least {floor}"
    return f"silent for {_seconds(worst.silent_s)} ({bound})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _groups(
    states: Iterable[RankState], key: Callable[[RankState], object]
) -> list[list[RankState]]:
    """Return those of one key together, in the order of their first."""
    groups: dict[object, list[RankState]] = {}
    for state in states:
        groups.setdefault(key(state), []).append(state)
    return list(groups.values())


def _ranks(group: list[RankState]) -> str:
    return ranks_in_words(state.rank for state in group)


def _wait(group: list[RankState]) -> str:
    return "waits" if len(group) == 1 else "wait"
