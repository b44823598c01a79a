"""What is told of a hang follows from stacks and beats alone."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from typing import Any

import pytest

from mpt import evaluate
from mpt.launch import diagnosis
from mpt.launch.diagnosis import diagnose, ranks_in_words, stuck_ranks
from mpt.launch.hang import RankState, bound_s, hung, overdue
from mpt.launch.pulse import Beat, Phase
from mpt.launch.stacks import Frame, parse_stacks
from mpt.recipe.launch import Hang
from mpt.train import watch

CFG = Hang()
MAIN = 0x7F00

TORCH = "/venv/lib/python3.11/site-packages/torch"
OWN = "/home/me/src/mpt"

STEP = f"{OWN}/train/step.py:52 train_step"
LOOP = f"{OWN}/train/loop.py:88 loop"
INJECT = f"{OWN}/train/inject.py:99 begin"
GATHER = [
    f"{TORCH}/distributed/distributed_c10d.py:4344 all_gather_single",
    f"{TORCH}/distributed/c10d_logger.py:83 wrapper",
]
REDUCE = f"{TORCH}/distributed/distributed_c10d.py:3200 all_reduce"
FUNCTIONAL = f"{TORCH}/distributed/_functional_collectives.py:2 wait_tensor"
SAVE = [REDUCE, f"{OWN}/checkpoint/save.py:9 _run"]
HOOK = [*GATHER, f"{OWN}/train/pace.py:190 __call__", f"{TORCH}/distributed/fsdp/hook.py:1 hook"]
BACKWARD = f"{TORCH}/autograd/graph.py:870 _engine_run_backward"
JOIN = "/usr/lib/python3.11/threading.py:1119 join"
RESULT = "/usr/lib/python3.11/concurrent/futures/_base.py:451 result"
READER = ["/usr/lib/python3.11/pathlib.py:1044 open", f"{OWN}/data/shard.py:3 rows"]


def text(*threads: list[str], header: str = "Thread") -> str:
    """Write stacks as faulthandler does, the main thread last."""
    found = []
    for i, frames in enumerate(threads):
        identity = MAIN if i == len(threads) - 1 else 0x100 + i
        found.append(f"{header} 0x{identity:016x} (most recent call first):")
        for frame in frames:
            place, function = frame.split(" ")
            file, line = place.split(":")
            found.append(f'  File "{file}", line {line} in {function}')
        found.append("")
    return "\n".join(found)


def state(rank: int, *threads: list[str], **changes: Any) -> RankState:
    """Return a rank that has been silent for 63 s in step 17."""
    values: dict[str, Any] = {
        "node": "node-a",
        "phase": Phase.STEP,
        "step": 16,
        "silent_s": 63.2,
        "slowest_s": 3.1,
        "thread": MAIN,
        "process": "S",
        "dump": text(*threads) if threads else "",
    }
    return RankState(rank=rank, **values | changes)


WAITS = [REDUCE, f"{OWN}/dist.py:93 sum_over_ranks", STEP, LOOP]


def test_the_sentence_says_who_where_when_how_long_and_who_waits() -> None:
    states = [state(rank, WAITS) for rank in (0, 2, 3, 4)] + [state(1, [INJECT, LOOP])]
    assert stuck_ranks(states) == [1]
    assert diagnose(states, CFG) == (
        "rank 1 is stuck in mpt/train/inject.py:99 (begin) in step 17, silent for 63 s "
        "(the bound is 60 s: 5 x the slowest recent step of 3.1 s, at least 60 s); "
        "ranks 0, 2-4 wait for it in a collective called from mpt/train/step.py:52 (train_step)"
    )


@pytest.mark.parametrize(
    "threads",
    [
        [[*GATHER, *HOOK[2:], STEP]],
        [[f"{TORCH}/_ops.py:1 __call__", FUNCTIONAL, STEP]],
        [HOOK, [BACKWARD, STEP]],
        [[*HOOK, BACKWARD, STEP]],
        [[f"{TORCH}/distributed/rendezvous.py:7 _create_c10d_store", STEP]],
        [SAVE, [JOIN, f"{OWN}/checkpoint/save.py:5 wait", STEP]],
        [[f"{OWN}/train/watch.py:80 settle", LOOP]],
    ],
    ids=["all-gather", "functional", "autograd", "backward", "meeting", "save", "device"],
)
def test_a_rank_waits_if_its_main_thread_does_or_the_thread_that_it_waits_for(
    threads: list[list[str]],
) -> None:
    words = diagnose([state(0, *threads), state(1, [INJECT, LOOP])], CFG)
    assert words.startswith("rank 1 is stuck in mpt/train/inject.py:99")
    assert "; rank 0 waits for it " in words


@pytest.mark.parametrize(
    "threads",
    [
        [[f"{TORCH}/distributed/fsdp/_fully_shard/_fsdp_collectives.py:500 copy_out", STEP]],
        [[f"{TORCH}/nn/functional.py:5 linear", f"{OWN}/model/network.py:77 forward", *WAITS]],
        [SAVE, [BACKWARD, STEP]],
        [SAVE, [JOIN, f"{OWN}/data/loader.py:5 next", STEP]],
        [READER, [RESULT, f"{OWN}/data/loader.py:5 next", STEP]],
    ],
    ids=["computing in fsdp", "computing", "backward beside a save", "loader", "reader"],
)
def test_a_rank_is_stuck_if_only_other_threads_wait_or_its_frames_only_pass_through(
    threads: list[list[str]],
) -> None:
    assert diagnose([state(0, *threads), state(1, WAITS)], CFG).startswith("rank 0 is stuck in ")


def test_the_main_thread_is_the_one_that_beats_and_before_it_beat_the_oldest() -> None:
    dump = text([INJECT, LOOP], WAITS)
    asked = state(1, [INJECT, LOOP])
    assert "rank 0 waits" in diagnose([state(0, dump=dump, thread=MAIN), asked], CFG)
    assert "rank 0 waits" in diagnose([state(0, dump=dump, thread=0xDEAD), asked], CFG)
    assert "ranks 0, 1 are stuck" in diagnose([state(0, dump=dump, thread=0x100), asked], CFG)


def test_the_place_is_the_innermost_line_and_the_one_of_ours_that_called_it() -> None:
    waiter = [RESULT, f"{OWN}/data/loader.py:5 next", LOOP]
    assert diagnose([state(0, READER, waiter)], CFG).startswith(
        "rank 0 is stuck in pathlib.py:1044 (open), called from mpt/data/shard.py:3 (rows) in step"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process": "T"}, "rank 0 was stopped by a signal (SIGSTOP) in mpt/train/inject.py:99"),
        ({"process": "t"}, "rank 0 is held by a debugger in mpt/train/inject.py:99"),
        ({"process": "D"}, "rank 0 is in a wait for a disk or a device that cannot be interrupted"),
        ({"process": "T", "dump": text(WAITS)}, "(all_reduce), called from mpt/train/step.py:52"),
        ({"process": ""}, "rank 0 has ended unseen"),
        ({"dump": ""}, "rank 0 gave no stack in step 17"),
        (
            {"dump": "", "phase": Phase.START},
            "rank 0 has not begun: it gave no stack while starting",
        ),
        ({"phase": Phase.FIRST_STEP}, "in step 17, its first, which compiles, silent for 63 s"),
        ({"phase": Phase.SAVE}, "in the save of step 16, silent for 63 s (the bound is 900 s"),
        ({"phase": Phase.EVALUATE}, "in the evaluation after step 16"),
        ({"phase": Phase.END}, "after the last step, 16"),
        ({"slowest_s": 20.0}, "(the bound is 100 s: 5 x the slowest recent step of 20 s,"),
        ({"slowest_s": 0.0}, "(the bound is 60 s); rank 1 waits"),
    ],
)
def test_each_kind_of_silence_has_its_words(changes: dict[str, Any], words: str) -> None:
    values = {"dump": text([INJECT, LOOP])} | changes
    assert words in diagnose([state(0, **values), state(1, WAITS)], CFG)


def test_if_all_wait_in_one_place_it_is_what_lies_between_them() -> None:
    states = [state(rank, WAITS) for rank in range(3)]
    words = diagnose(states, CFG)
    assert stuck_ranks(states) == []
    assert words.startswith("all ranks wait in a collective called from mpt/train/step.py:52")
    assert "no rank is stuck: it is the network" in words


def test_if_all_wait_in_different_places_or_steps_their_collectives_do_not_match() -> None:
    other = state(1, [REDUCE, f"{OWN}/evaluate.py:30 evaluate"])
    for odd in (other, state(1, WAITS, step=15)):
        words = diagnose([state(0, WAITS), odd, state(2, WAITS)], CFG)
        assert "ranks 0, 2 wait in a collective called from mpt/train/step.py:52" in words
        assert "; rank 1 waits in a collective called from " in words
        assert "no rank is stuck: their collectives do not match" in words


def test_nodes_are_named_where_there_are_several_and_the_overdue_come_first() -> None:
    states = [
        state(0, [LOOP], node="node-a", silent_s=1.0),
        state(1, [INJECT], node="node-b"),
        state(2, [INJECT], node="node-c"),
    ]
    words = diagnose(states, CFG)
    assert words.startswith("ranks 1, 2 on node-b, node-c are stuck in mpt/train/inject.py:99")
    assert "; rank 0 on node-a is stuck in mpt/train/loop.py:88" in words


def test_of_many_different_stuck_ranks_some_are_described_and_the_others_counted() -> None:
    states = [state(rank, [f"{OWN}/train/loop.py:{rank} loop"]) for rank in range(100)]
    words = diagnose(states, CFG)
    assert words.count("is stuck") == diagnosis.MOST_NAMED
    assert words.endswith("96 more groups of ranks are stuck elsewhere")


def test_a_rank_travels_between_nodes_as_json() -> None:
    states = [state(0, WAITS), state(1, [INJECT, LOOP])]
    sent = json.loads(json.dumps([asdict(s) for s in states]))
    assert diagnose([RankState(**s) for s in sent], CFG) == diagnose(states, CFG)
    assert hung([RankState(**s) for s in sent], CFG) == hung(states, CFG) == [0, 1]


def test_names_of_functions_that_wait_for_a_device_are_still_theirs() -> None:
    for (file, name), module in zip(diagnosis._DEVICE_WAITS, [watch.Watch, evaluate], strict=True):
        assert inspect.getfile(getattr(module, name)).endswith(file)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([1], "rank 1"), ([0, 1], "ranks 0, 1"), ([7, 0, 2, 3, 4, 6], "ranks 0, 2-4, 6, 7")],
)
def test_ranks_are_listed_as_a_person_would(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


PYTHON_3_14 = """\
Thread 0x00007f0000000001 [mpt-loader_0] (most recent call first):
  File "/a/odd \\u20ac, line 3 in x.py", line 12 in <lambda>
  <truncated rest of calls>

Current thread 0x0000000000007f00 [python] (most recent call first):
  Garbage-collecting
  File ???, line ??? in ???
  File "/a/main.py", line 3 in <module>

Current thread's C stack trace (most recent call first):
  Binary file "/lib/libc.so.6", at pause+0x12 [0x7f]
"""


def test_stacks_of_newer_pythons_are_understood() -> None:
    assert parse_stacks(PYTHON_3_14) == {
        0x7F0000000001: (Frame("/a/odd \\u20ac, line 3 in x.py", 12, "<lambda>"),),
        MAIN: (Frame("???", 0, "???"), Frame("/a/main.py", 3, "<module>")),
    }
    assert parse_stacks("") == parse_stacks("Fatal Python error\n\0garbage") == {}


def test_of_two_dumps_of_a_thread_the_later_counts() -> None:
    twice = text([LOOP]) + "\n" + text([INJECT], [STEP])
    assert list(parse_stacks(twice)) == [0x100, MAIN]
    assert parse_stacks(twice)[MAIN][0].function == "train_step"


@pytest.mark.parametrize(
    ("phase", "slowest_s", "bound"),
    [
        (Phase.START, 1e6, 900.0),
        (Phase.FIRST_STEP, 1e6, 1800.0),
        (Phase.STEP, 3.0, 60.0),
        (Phase.STEP, 30.0, 150.0),
        (Phase.SAVE, 100.0, 900.0),
        (Phase.SAVE, 200.0, 1000.0),
        (Phase.EVALUATE, 1.0, 300.0),
        (Phase.END, 0.0, 900.0),
    ],
)
def test_the_bound_is_learned_but_never_less_than_the_recipe_says(
    phase: Phase, slowest_s: float, bound: float
) -> None:
    assert bound_s(Beat(phase, 3, 0.0, slowest_s, MAIN), CFG) == bound


def beat(phase: Phase, step: int, at: float = 0.0) -> Beat:
    return Beat(phase, step, at, 1.0, MAIN)


def test_a_rank_that_waits_for_a_patient_one_does_not_hang() -> None:
    """Rank 1 has saved and waits, in a step, for rank 0 that still deletes old checkpoints."""
    beats = {0: beat(Phase.SAVE, 17), 1: beat(Phase.STEP, 17)}
    assert overdue(beats, 100.0, CFG) == []
    assert overdue(beats, 901.0, CFG) == [0]


@pytest.mark.parametrize(
    ("behind", "ahead"),
    [
        ((Phase.STEP, 16), (Phase.EVALUATE, 17)),
        ((Phase.STEP, 16), (Phase.SAVE, 17)),
        ((Phase.STEP, 17), (Phase.END, 18)),
        ((Phase.STEP, 16), (Phase.STEP, 17)),
    ],
)
def test_the_one_furthest_behind_hangs_by_its_own_bound(
    behind: tuple[Phase, int], ahead: tuple[Phase, int]
) -> None:
    beats = {0: beat(*ahead), 1: beat(*behind)}
    assert overdue(beats, 59.0, CFG) == []
    assert overdue(beats, 61.0, CFG) == [1]


def test_without_ranks_nothing_hangs() -> None:
    assert overdue({}, 1e9, CFG) == hung([], CFG) == []
    assert diagnose([], CFG) == "no rank could say where it is"
