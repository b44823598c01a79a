"""Saves that are killed, cut off, or find no room: a whole checkpoint is there at any instant."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

from mpt.checkpoint.layout import committed, newest_sound, read_manifest, verify_all
from mpt.checkpoint.load import restore
from mpt.checkpoint.save import Saver, SupersededError
from mpt.dist import Ranks
from mpt.errors import CheckpointError
from mpt.state import RunState
from tests.disks import fill_up, make_read_only, small_disk
from tests.dist.saving import digest_whole, lean, saver_in, state_at
from tests.tiny_model import TINY
from tests.world import on_ranks

Reports = list[tuple[str, dict[str, Any]]]


def lean_saver(ranks: Ranks, root: Path, step: int, **settings: Any) -> tuple[Saver, Reports]:
    reports: Reports = []
    report = lambda kind, **fields: reports.append((kind, fields))  # noqa: E731
    return saver_in(root, lean(ranks, step), ranks, report, **settings), reports


def save_lean(
    ranks: Ranks, root: Path, step: int, keep: int, die: tuple[int, int] | None = None
) -> str:
    """Save one step; rank `die[0]` is killed at its `die[1]`-th call that touches a file."""
    saver, _ = lean_saver(ranks, root, step, keep=keep)
    if die and die[0] == ranks.rank:
        _die_at_call(die[1])
    saver.save(state_at(step))
    saver.close()
    return digest_whole(lean(ranks, step))


TOUCHING = {"mkdir", "open", "write", "flush", "fsync", "rename", "replace", "close", "__exit__"}
TOUCHING |= {"unlink", "rmdir", "truncate"}


def _die_at_call(nth: int) -> None:
    """Kill this process before the nth call into the system that a new thread makes for a file."""
    n = 0

    def watch(_: FrameType, event: str, call: Any) -> None:
        nonlocal n
        if event == "c_call" and call.__name__ in TOUCHING:
            owner = call.__module__ or type(call.__self__).__module__
            n += owner in ("posix", "io", "_io")
            if n == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)


def go_on(ranks: Ranks, root: Path) -> tuple[RunState | None, str]:
    """What the next attempt does: load the newest, and save a later step."""
    tensors = lean(ranks, 99)
    state = restore(root / "checkpoints", tensors, TINY, ranks, reject=_nothing_is_damaged)
    loaded = digest_whole(tensors)
    saver, reports = lean_saver(ranks, root, 5, attempt=1, keep=1)
    saver.save(state_at(5))
    saver.close()
    assert [kind for kind, _ in reports] == ["checkpoint"], reports
    return state, loaded


def _nothing_is_damaged(directory: Path, problems: list[str]) -> None:
    raise AssertionError(f"{directory}: {problems}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_at_any_write_fsync_or_rename_leaves_a_whole_checkpoint(
    root: Path, tmp_path_factory: pytest.TempPathFactory, rank: int
) -> None:
    digests = {step: on_ranks(2, save_lean, root, step, 1)[0] for step in (2, 3)}
    digests[4] = on_ranks(1, digest_of, 4)[0]
    found, seen = [], set()
    for nth in count(1):
        torn = tmp_path_factory.mktemp("torn") / "run"
        shutil.copytree(root, torn)
        try:
            on_ranks(2, save_lean, torn, 4, 1, (rank, nth))
        except AssertionError:
            directory, passed_over = newest_sound(torn)
            left = read_manifest(directory).state
            assert (left.step in (3, 4), passed_over) == (True, {})
            assert not any(verify_all(torn).values()), "what is committed is whole"
            found.append(left.step)
            if (there := files_in(torn)) not in seen:  # else it has been tried from there
                seen.add(there)
                assert on_ranks(2, go_on, torn) == [(left, digests[left.step])] * 2
                assert [path.name for path in (torn / "checkpoints").iterdir()] == ["step-00000005"]
        else:
            break
    assert len(found) > (40 if rank == 0 else 15), "it was not killed where it writes"
    assert set(found) == ({3, 4} if rank == 0 else {3}), "rank 0 commits when all have written"


def files_in(root: Path) -> frozenset[tuple[str, int]]:
    paths = [path for path in (root / "checkpoints").rglob("*") if not path.name.startswith(".")]
    return frozenset((str(path.relative_to(root)), path.stat().st_size) for path in paths)


def digest_of(ranks: Ranks, step: int) -> str:
    return digest_whole(lean(ranks, step))


def save_with_trouble(
    ranks: Ranks, root: Path, harm: Callable[[Path], Any], mend: Callable[[Path], Any]
) -> tuple[Reports, str]:
    """Save step 4 on a disk in trouble, train on, and save step 5 when that is over."""
    saver, reports = lean_saver(ranks, root, 4)
    for change, step in ((harm, 4), (mend, 5)):
        if ranks.is_first:
            change(root / "checkpoints")
        dist.barrier()
        saver.save(state_at(step))
        saver.wait()
    saver.close()
    return reports, ""


@pytest.fixture
def on_small_disk(root: Path) -> Any:
    with small_disk(root / "checkpoints", kib=256):
        on_ranks(2, save_lean, root, 3, 3)
        yield root


class Fill:
    """Fills a disk but for so many pages."""

    def __init__(self, free_pages: int) -> None:
        self.free_pages = free_pages

    def __call__(self, place: Path) -> None:
        fill_up(place, self.free_pages)


def free(place: Path) -> None:
    (place / "filler").unlink()


@pytest.mark.parametrize("free_pages", range(6))
def test_a_full_disk_fails_that_save_alone(on_small_disk: Path, free_pages: int) -> None:
    """Six pages hold a whole checkpoint, a file each."""
    for reports, _ in on_ranks(2, save_with_trouble, on_small_disk, Fill(free_pages), free):
        assert [kind for kind, _ in reports] == ["checkpoint_failed", "checkpoint"], reports
        assert "the save of step 4 failed" in reports[0][1]["why"]
    _only_good_ones_are_there(on_small_disk, [5, 3])


def test_a_read_only_disk_fails_that_save_alone(on_small_disk: Path) -> None:
    results = on_ranks(2, save_with_trouble, on_small_disk, make_read_only, make_writable)
    for reports, _ in results:
        assert [kind for kind, _ in reports] == ["checkpoint_failed", "checkpoint"], reports
    assert "Read-only file system" in results[0][0][0][1]["why"]
    _only_good_ones_are_there(on_small_disk, [5, 3])


def make_writable(place: Path) -> None:
    assert make_read_only(place, read_only=False)


def _only_good_ones_are_there(root: Path, steps: list[int]) -> None:
    assert [read_manifest(path).step for path in committed(root / "checkpoints")] == steps
    assert not any(verify_all(root).values())
    assert len(list((root / "checkpoints").iterdir())) == len(steps), "nothing is left over"


def save_where_nothing_can_be_written(ranks: Ranks, root: Path) -> tuple[list[str], str]:
    if ranks.is_first:
        (root / "checkpoints").write_text("a file where the directory should be")
    saver, reports = lean_saver(ranks, root, 4)
    saver.save(state_at(4))
    try:
        saver.close()
    except CheckpointError as error:
        return [kind for kind, _ in reports], str(error)
    return [kind for kind, _ in reports], ""


def test_a_last_save_that_fails_is_reported_and_raised_on_all_ranks(root: Path) -> None:
    for reports, raised in on_ranks(2, save_where_nothing_can_be_written, root):
        assert reports == ["checkpoint_failed"]
        assert "the save of step 4 failed" in raised


def fail_to_commit_on_the_first_rank(ranks: Ranks, root: Path) -> tuple[list[str], str]:
    """A failure that nobody foresaw, on one rank, between two collectives."""
    saver, reports = lean_saver(ranks, root, 1, versions={"not": object()})
    saver.save(state_at(1))
    try:
        saver.close()
    except CheckpointError as error:
        return [kind for kind, _ in reports], str(error)
    return [kind for kind, _ in reports], ""


def test_an_unforeseen_failure_of_one_rank_is_raised_on_all_and_none_waits(root: Path) -> None:
    results = on_ranks(2, fail_to_commit_on_the_first_rank, root)
    assert "TypeError" in results[0][1]
    assert "another rank" in results[1][1]
    assert [reports for reports, _ in results] == [["checkpoint_failed"]] * 2


def save_when_superseded(ranks: Ranks, root: Path) -> list[str]:
    """Save step 4 while a newer attempt takes the run: after the save has begun."""
    newer = iter([None])  # at first there is none
    saver, reports = lean_saver(ranks, root, 4, attempt=6, newer=lambda: next(newer, 7))
    saver.save(state_at(4))
    saver.wait()
    said = [kind for kind, _ in reports]
    for end in (lambda: saver.save(state_at(5)), saver.close):
        try:
            end()
        except SupersededError:
            said.append("superseded")
    return said


def test_a_group_that_was_given_up_commits_nothing_and_ends_on_all_ranks(root: Path) -> None:
    on_ranks(2, save_lean, root, 3, 3)
    found = on_ranks(2, save_when_superseded, root)
    assert found == [["checkpoint_failed", "superseded", "superseded"]] * 2
    assert [path.name for path in committed(root / "checkpoints")] == ["step-00000003"]


def save_twice_at_once(ranks: Ranks, root: Path) -> list[str]:
    """Two attempts save the same step at the same time, neither knowing of the other."""
    savers = [lean_saver(ranks, root, 4, attempt=attempt) for attempt in (0, 1)]
    for saver, _ in savers:
        saver.save(state_at(4))
    for saver, _ in savers:
        saver.wait()
    return sorted(kind for _, reports in savers for kind, _ in reports)


def test_two_groups_never_write_the_same_files(root: Path) -> None:
    (kinds,) = on_ranks(1, save_twice_at_once, root)
    assert kinds in (["checkpoint", "checkpoint_failed"], ["checkpoint"])
    assert newest_sound(root)[0].name == "step-00000004"


@pytest.mark.parametrize(("attempt", "stays"), [(0, False), (1, False), (2, True)])
def test_leftovers_are_swept_up_but_not_those_of_a_later_attempt(
    root: Path, attempt: int, stays: bool
) -> None:
    leftover = root / "checkpoints" / f"step-00000002.attempt-{attempt}.partial"
    leftover.mkdir(parents=True)
    (leftover / "weights").write_text("half")
    on_ranks(1, save_as_attempt_one, root)
    assert leftover.exists() is stays


def save_as_attempt_one(ranks: Ranks, root: Path) -> None:
    saver, _ = lean_saver(ranks, root, 4, attempt=1)
    saver.save(state_at(4))
    saver.close()


def test_what_a_dead_save_has_left_is_not_in_the_way_of_the_next(on_small_disk: Path) -> None:
    leftover = on_small_disk / "checkpoints" / "step-00000004.attempt-0.partial"
    leftover.mkdir()
    fill_up(leftover)
    on_ranks(1, save_as_attempt_one, on_small_disk)
    _only_good_ones_are_there(on_small_disk, [4, 3])


def save_when_nothing_is_known_of_others(ranks: Ranks, root: Path) -> list[str]:
    def newer() -> int | None:
        raise OSError("the directory of logs cannot be read")

    saver, reports = lean_saver(ranks, root, 4, newer=newer)
    saver.save(state_at(4))
    saver.wait()
    return [kind for kind, _ in reports]


def test_nothing_is_committed_where_a_newer_attempt_could_not_be_seen(root: Path) -> None:
    results = on_ranks(2, save_when_nothing_is_known_of_others, root)
    assert results == [["checkpoint_failed"]] * 2
    assert not committed(root / "checkpoints")
