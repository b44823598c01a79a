"""Laws of copies in memory: whole or absent, and the same step on all ranks."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

from mpt.checkpoint import memory as memory_module
from mpt.checkpoint.memory import Every, fewest_steps
from mpt.checkpoint.room import check_room
from mpt.checkpoint.slot import HEADER_BYTES, Slot
from mpt.dist import Ranks
from mpt.recipe.model import Model
from mpt.state import RunState
from tests.disks import small_disk
from tests.dist.saving import Files, digest_whole, lean, memory_in, scrambled, state_at
from tests.tiny_model import TINY
from tests.world import on_ranks


def fill(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(others[name])


def take(
    ranks: Ranks, files: Files, steps: list[tuple[int, ...]], then_die: bool = False
) -> dict[int, str]:
    """Take copies at steps of this rank's own, and return the digest of each step's state."""
    tensors = lean(ranks, 0)
    memory = memory_in(files[ranks.rank], tensors, ranks)
    digests = {}
    for step in sorted({step for own in steps for step in own}):
        fill(tensors, lean(ranks, step))
        digests[step] = digest_whole(tensors)
        if step in steps[ranks.rank]:
            memory.take(state_at(step))
    memory.wait()
    digest_whole(tensors)  # all ranks have come here
    if then_die:
        os.kill(os.getpid(), signal.SIGKILL)
    return digests


def load(ranks: Ranks, files: Files) -> tuple[RunState | None, str]:
    tensors = lean(ranks, 99)
    memory = memory_in(files[ranks.rank], tensors, ranks)
    found = memory.newest_common()
    if found is not None:
        assert memory.load(found.step) == found
    assert memory.newest_common() == found, "a copy is there until the next but one is taken"
    return found, digest_whole(tensors)


def test_a_copy_outlives_the_processes_that_took_it(files: Files) -> None:
    with pytest.raises(AssertionError, match="died without a word"):
        on_ranks(2, take, files, [(1, 2)] * 2, True)
    (expected,) = {digest for _, digest in on_ranks(2, digest_of, 2)}
    assert on_ranks(2, load, files) == [(state_at(2), expected)] * 2


def digest_of(ranks: Ranks, step: int) -> tuple[int, str]:
    return step, digest_whole(lean(ranks, step))


def test_ranks_that_are_one_copy_apart_agree_on_the_older(files: Files) -> None:
    digests, _ = on_ranks(2, take, files, [(1, 2, 3), (1, 2)])
    for _ in range(2):
        assert on_ranks(2, load, files) == [(state_at(2), digests[2])] * 2


def load_and_take_on_one_rank(ranks: Ranks, files: Files) -> RunState | None:
    memory = memory_in(files[ranks.rank], lean(ranks, 3), ranks)
    assert memory.newest_common() == state_at(2)
    memory.load(2)
    if not ranks.is_first:  # rank 0 is killed before it takes step 3 again
        memory.take(state_at(3))
        memory.wait()
    return memory.newest_common()


def test_a_step_that_is_taken_again_is_never_put_together_from_both_times(files: Files) -> None:
    on_ranks(2, take, files, [(1, 2, 3), (1, 2)])
    assert on_ranks(2, load_and_take_on_one_rank, files) == [state_at(2)] * 2


def test_without_a_common_step_there_is_none(files: Files) -> None:
    on_ranks(2, take, files, [(1, 2, 3, 4), (1, 2)])
    assert [state for state, _ in on_ranks(2, load, files)] == [None, None]


@pytest.mark.parametrize("place", [0, 9, 13, 40, HEADER_BYTES, HEADER_BYTES + 4321, -1])
def test_a_flipped_bit_is_not_loaded_and_the_copy_before_is(files: Files, place: int) -> None:
    (digests,) = on_ranks(1, take, files, [(1, 2)])
    descriptor = os.open(files[0], os.O_RDWR)
    with mmap.mmap(descriptor, 0) as whole:
        # The second of the two halves holds step 2.
        whole[place if place < 0 else len(whole) // 2 + place] ^= 4
    os.close(descriptor)
    assert on_ranks(1, load, files) == [(state_at(1), digests[1])]


OTHER = Model(d_model=32, n_heads=8, n_layers=2, max_seq_len=16, vocab_size=101)


def load_another(ranks: Ranks, files: Files, model: Model, seed: int) -> list[RunState | None]:
    """Return what is found for this model and seed, before and after a copy of it is taken."""
    memory = memory_in(files[ranks.rank], scrambled(ranks, 4, model), ranks, seed=seed)
    before = memory.newest_common()
    memory.take(state_at(4))
    memory.wait()
    return [before, memory.newest_common()]


@pytest.mark.parametrize("change", ["nothing", "model", "seed", "world size", "ranks swapped"])
def test_a_copy_of_something_else_is_not_loaded(files: Files, change: str) -> None:
    on_ranks(2, load_another, files, TINY, 17)
    there = files[::-1] if change == "ranks swapped" else files
    model = OTHER if change == "model" else TINY
    seed = 18 if change == "seed" else 17
    world_size = 1 if change == "world size" else 2
    before = state_at(4) if change == "nothing" else None
    found = on_ranks(world_size, load_another, there, model, seed)
    assert found == [[before, state_at(4)]] * world_size


def kill_at_each_line(ranks: Ranks, files: Files, with_checksum: bool) -> list[int]:
    """Take copies of steps 1 and 2, be killed in that of 3, and check what is left; at each line.

    Returns:
        The newest step that was left, by the number of the line.
    """
    if not with_checksum:
        Slot._checksum = lambda self: ""  # type: ignore[method-assign]
    tensors = lean(ranks, 0)
    states = {step: lean(ranks, step) for step in (1, 2, 3)}
    digests = {step: digest_whole(state) for step, state in states.items()}
    memory = memory_in(files[0], tensors, ranks)
    left: list[int] = []
    while True:
        memory.forget()
        for step in (1, 2):
            fill(tensors, states[step])
            memory.take(state_at(step))
        memory.wait()
        fill(tensors, states[3])
        child = os.fork()
        if child == 0:
            _die_at_line(len(left) + 1)
            memory.take(state_at(3))
            memory.wait()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = memory.newest_common()
        assert found is not None
        for slot in memory._slots:
            if (state := slot.read()) is not None:
                slot.pour(tensors)
                assert digest_whole(tensors) == digests[state["step"]], "both, not only the newest"
        if not os.WIFSIGNALED(status):
            assert (os.WEXITSTATUS(status), found) == (0, state_at(3))
            return left
        left.append(found.step)


def _die_at_line(nth: int) -> None:
    """Kill this process before the nth line that it runs of what takes copies, in any thread."""
    n = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal n
        if Path(frame.f_code.co_filename).name not in ("memory.py", "slot.py"):
            return None
        n += event == "line"
        if n == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    threading.settrace(trace)


@pytest.mark.parametrize("with_checksum", [True, False], ids=["both guards", "the mark alone"])
def test_a_kill_at_any_line_of_a_copy_leaves_one_that_is_whole(
    files: Files, with_checksum: bool
) -> None:
    (left,) = on_ranks(1, kill_at_each_line, files, with_checksum)
    assert len(left) > 30
    assert set(left) == {2, 3}, "up to the mark the old one counts, from then on the new one"


def run_out_of_memory(ranks: Ranks, files: Files) -> tuple[list[str], bool]:
    said: list[str] = []
    memory = memory_in(files[ranks.rank], lean(ranks, 1), ranks, said=said)
    return said, memory.due(1)


def test_where_one_rank_has_no_memory_none_keeps_copies_and_all_say_so(
    files: Files, tmp_path: Path
) -> None:
    with small_disk(tmp_path, kib=1024) as disk:
        (disk / "memory").touch()
        there = [files[0], str(disk / "memory")]
        (mine, due), (theirs, due_there) = on_ranks(2, run_out_of_memory, there)
        assert (disk / "memory").stat().st_blocks == 0, "what was taken is given back"
    assert "another rank" in mine[0]
    assert "No space left" in theirs[0]
    assert not due
    assert not due_there


def due_steps(ranks: Ranks, files: Files, every: Every, cost_shares: list[float]) -> list[int]:
    memory_module.COST_SHARE = cost_shares[ranks.rank]
    memory = memory_in(files[ranks.rank], lean(ranks, 1), ranks, every=every)
    found = []
    for step in range(1, 13):
        if memory.due(step):
            memory.take(state_at(step))
            found.append(step)
    memory.wait()
    return found


@pytest.mark.parametrize(
    ("every", "shares", "expected"),
    [
        ("off", [1.0, 1.0], []),
        (5, [1.0, 1.0], [5, 10]),
        ("auto", [1e9, 1e9], list(range(1, 13))),
        ("auto", [1e9, 1e-9], [1, 2, 3, 4, 5]),
    ],
)
def test_copies_are_due_at_the_same_steps_on_all_ranks(
    files: Files, every: Every, shares: list[float], expected: list[int]
) -> None:
    assert on_ranks(2, due_steps, files, every, shares) == [expected] * 2


def test_without_a_supervisor_no_copy_is_ever_due_or_found() -> None:
    assert on_ranks(1, without_supervisor) == [(False, None)]


def without_supervisor(ranks: Ranks) -> tuple[bool, RunState | None]:
    memory = memory_in(None, lean(ranks, 1), ranks)
    return memory.due(1), memory.newest_common()


@pytest.mark.parametrize(
    ("cost_s", "step_s", "expected"),
    [(0.001, 1.0, 1), (0.02, 1.0, 1), (0.021, 1.0, 2), (3, 1, 150)],
)
def test_copies_cost_less_than_their_share_of_the_steps_between_them(
    cost_s: float, step_s: float, expected: int
) -> None:
    assert fewest_steps(cost_s, step_s) == expected


def test_copies_are_not_taken_from_memory_that_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    check_room(1 << 20)
    with pytest.raises(OSError, match="GiB wanted"):
        check_room(free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with pytest.raises(OSError, match="1000 x"):
        check_room(free // 1000)
