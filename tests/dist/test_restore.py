"""A run goes on from the newer of memory and disk, and from what is sound of it."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mpt.checkpoint.layout import committed, step_directory, step_of
from mpt.display import Display
from mpt.dist import Ranks
from mpt.errors import CheckpointError
from mpt.launch.attempt import MEMORY_FD
from mpt.log import Journal, read_lines
from mpt.recipe.recipe import Recipe
from mpt.rundir import EVENTS
from mpt.state import RunState
from mpt.train.begin import begin_with
from mpt.train.restore import restore
from tests.dist.running import DONE, STEPS, one_attempt, prepared
from tests.dist.saving import Files, digest_whole, lean, memory_in, saver_in, state_at
from tests.tiny_model import TINY
from tests.world import on_ranks


def leave(ranks: Ranks, root: Path, files: Files, in_memory: list[int], on_disk: list[int]) -> None:
    """Be an attempt that has saved some steps and has others in memory."""
    tensors = lean(ranks, 0)
    memory = memory_in(files[ranks.rank], tensors, ranks)
    saver = saver_in(root, tensors, ranks, lambda *_, **__: None)
    for step in sorted({*in_memory, *on_disk}):
        for name, tensor in lean(ranks, step).items():
            tensors[name].copy_(tensor)
        if step in in_memory:
            memory.take(state_at(step))
        if step in on_disk:
            saver.save(state_at(step))
    saver.close()
    memory.wait()


def go_on(
    ranks: Ranks, root: Path, files: Files, given_up: int | None, init_from: Path | None = None
) -> tuple[RunState | str, bool, str]:
    """Be the next attempt; return its state, whether the tensors are of it, and what it said."""
    tensors, terminal = lean(ranks, 99), io.StringIO()
    memory = memory_in(files[ranks.rank], tensors, ranks)
    try:
        state = restore(
            root,
            tensors,
            TINY,
            memory,
            ranks,
            begin=lambda: None if init_from is None else pytest.fail("it has a checkpoint"),
            given_up=lambda state: state.step == given_up,
            journal=Journal(root),
            display=Display(terminal, 100, 10),
            terminal=terminal,
        )
    except CheckpointError as error:
        return str(error), False, terminal.getvalue()
    expected = lean(ranks, state.step if state.step else 99)
    same = digest_whole(tensors) == digest_whole(expected)
    if memory.newest_common() not in (None, state):
        return "what is not gone on from still counts", same, terminal.getvalue()
    return state, same, terminal.getvalue()


CASES: list[tuple[list[int], list[int], list[int], int | None, int, str]] = [
    # in memory, on disk, damaged on disk, given up; goes on from
    ([], [], [], None, 0, ""),
    ([], [4], [], None, 4, "disk"),
    ([6, 7], [4], [], None, 7, "memory"),
    ([6, 7], [], [], None, 7, "memory"),
    ([3, 4], [4], [], None, 4, "memory"),
    ([3], [4], [], None, 4, "disk"),
    ([3], [2, 4], [4], None, 3, "memory"),
    ([3], [4], [4], None, 3, "memory"),
    ([1], [2, 4], [4], None, 2, "disk"),
    ([6, 7], [4], [], 7, 4, "disk"),
    ([6, 7], [], [], 7, 0, ""),
]


@pytest.mark.parametrize(("in_memory", "on_disk", "damaged", "given_up", "step", "source"), CASES)
def test_a_run_goes_on_from_the_newest_state_that_is_sound(
    root: Path,
    files: Files,
    in_memory: list[int],
    on_disk: list[int],
    damaged: list[int],
    given_up: int | None,
    step: int,
    source: str,
) -> None:
    on_ranks(2, leave, root, files, in_memory, on_disk)
    for number in damaged:
        damage(root, number)
    results = on_ranks(2, go_on, root, files, given_up)
    expected = state_at(step) if source else RunState()
    assert [(state, same) for state, same, _ in results] == [(expected, True)] * 2
    events = [e for e in read_lines(root / EVENTS) if e["event"] == "resumed"]
    said: list[dict[str, Any]] = [
        {key: e[key] for key in ("attempt", "step", "samples", "source")} for e in events
    ]
    resumed = {"attempt": 0, "step": step, "samples": 10 * step, "source": source}
    assert said == ([resumed] if source else [])
    where = {"memory": f"memory at step {step}", "disk": f"the checkpoint of step {step}", "": ""}
    assert where[source] in results[0][2]


def damage(root: Path, step: int) -> None:
    path = step_directory(root / "checkpoints", step) / "weights-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_what_is_on_disk_is_not_hashed_when_memory_is_as_new(root: Path, files: Files) -> None:
    on_ranks(2, leave, root, files, [4], [4])
    damage(root, 4)
    for state, _, said in on_ranks(2, go_on, root, files, None):
        assert state == state_at(4)
        assert "damaged" not in said
    assert step_directory(root / "checkpoints", 4).exists()


def test_without_memory_damaged_checkpoints_are_an_error(root: Path, files: Files) -> None:
    on_ranks(2, leave, root, files, [], [4])
    damage(root, 4)
    results = on_ranks(2, go_on, root, files, None)
    assert all("all 1 checkpoints are damaged" in str(said) for said, _, _ in results)


def begin(ranks: Ranks, root: Path, files: Files, source: Path) -> tuple[str, str, str]:
    """Be the first attempt of a run; return hashes of weights and moments, and what it said."""
    tensors, terminal = lean(ranks, 0), io.StringIO()
    journal, display = Journal(root), Display(terminal, 100, 10)
    try:
        state = restore(
            root,
            tensors,
            TINY,
            memory_in(files[ranks.rank], tensors, ranks),
            ranks,
            begin=lambda: begin_with(str(source), tensors, ranks, journal, display),
            given_up=lambda state: False,
            journal=journal,
            display=display,
            terminal=terminal,
        )
    except CheckpointError as error:
        return "", "", str(error)
    assert state == RunState()
    weights, moments = parts(tensors)
    return weights, moments, terminal.getvalue()


def parts(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Hashes of weights and of the rest."""
    weights = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    return digest_whole(weights), digest_whole(
        {name: t for name, t in tensors.items() if name not in weights}
    )


def parts_of(ranks: Ranks, step: int) -> tuple[str, str]:
    return parts(lean(ranks, step))


@pytest.mark.parametrize("name", ["", "checkpoints/step-00000004"])
def test_a_new_run_begins_with_the_weights_of_another_and_with_no_moments(
    root: Path, files: Files, tmp_path: Path, name: str
) -> None:
    on_ranks(2, leave, root, files, [], [2, 4])
    there, here = on_ranks(1, parts_of, 4)[0], on_ranks(1, parts_of, 0)[0]
    new = tmp_path / "new"
    new.mkdir()
    for weights, moments, _ in on_ranks(3, begin, new, files * 2, root / name):
        assert (weights, moments) == (there[0], here[1])
    (event,) = [e for e in read_lines(new / EVENTS) if e["event"] == "begun_from"]
    assert event["path"] == str(root / "checkpoints/step-00000004")
    assert "begins with the weights of" in on_ranks(1, begin, new, files, root)[0][2]


def test_a_run_that_has_a_checkpoint_does_not_begin_anew(
    root: Path, files: Files, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(root / "tokenizer.model", other)
    on_ranks(2, leave, root, files, [], [4])
    on_ranks(2, leave, other, files, [], [2])
    for state, same, _ in on_ranks(2, go_on, root, files, None, other):
        assert (state, same) == (state_at(4), True)


def test_what_a_run_cannot_begin_with_is_an_error_on_all_ranks(
    root: Path, files: Files, tmp_path: Path
) -> None:
    on_ranks(2, leave, root, files, [], [4])
    new = tmp_path / "new"
    new.mkdir()
    results = on_ranks(2, begin, new, files, tmp_path / "nothing")
    assert all("there is no such directory" in said for *_, said in results)
    damage(root, 4)
    results = on_ranks(2, begin, new, files, root)
    assert all("its bytes have changed" in said for *_, said in results)
    assert (root / "checkpoints/step-00000004").exists(), "it is not ours to set aside"


def attempt(
    ranks: Ranks, files: Files, cfg: Recipe, run_dir: Path, number: int, raise_at: int
) -> str:
    """Train with memory that outlives the attempt; fail where step `raise_at` begins."""
    os.environ[MEMORY_FD] = str(os.open(files[ranks.rank], os.O_RDWR))
    return one_attempt(ranks, cfg, run_dir, number, {"raise_step": [[raise_at, 0]]}, None)


def test_a_checkpoint_that_was_due_is_saved_also_by_who_goes_on_from_memory(
    tmp_path: Path, files: Files
) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, memory_every_steps=1))
    run_dir.mkdir()
    with pytest.raises(AssertionError, match="injected"):
        on_ranks(1, attempt, files, cfg, run_dir, 0, 17)
    for number, due in ((1, 16), (2, STEPS)):  # every fourth, and the last
        # As if the attempt had been killed before it could commit.
        shutil.rmtree(step_directory(run_dir / "checkpoints", due))
        assert on_ranks(1, attempt, files, cfg, run_dir, number, 0) == [DONE]
    resumed = [e for e in read_lines(run_dir / EVENTS) if e["event"] == "resumed"]
    assert [(e["source"], e["step"]) for e in resumed] == [("memory", 16), ("memory", STEPS)]
    found = committed(run_dir / "checkpoints")
    assert sorted(map(step_of, found)) == [4, 8, 12, 16, STEPS]
