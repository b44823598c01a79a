"""Laws of checkpoints, on real process groups and real files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpt.checkpoint.layout import (
    MANIFEST,
    committed,
    damage,
    newest_sound,
    read_manifest,
    step_directory,
    verify_all,
)
from mpt.checkpoint.load import restore
from mpt.checkpoint.save import Origin, Saver
from mpt.checkpoint.tensors import read_tensors
from mpt.checkpoint.weights import open_weights
from mpt.dist import Ranks
from mpt.errors import CheckpointError
from mpt.optim import build_optimizer, training_tensors
from mpt.recipe.model import Model
from mpt.recipe.train import Optimizer
from mpt.state import RunState
from tests.tiny_model import TINY, digest, sharded, whole
from tests.world import on_ranks

STEPS = (1, 2, 3)

Saved = tuple[Path, dict[int, str]]
"""A run directory, and the digest of the state of each step."""


def scrambled(ranks: Ranks, step: int, cfg: Model = TINY) -> dict[str, Tensor]:
    """Return the tensors of a training state that is a function of `step` alone."""
    model = sharded(ranks, cfg, seed=step)
    optimizer = build_optimizer(model, Optimizer(lr=0.1))
    tensors = training_tensors(model, optimizer)
    for name, tensor in tensors.items():
        if name.startswith("optimizer.step."):
            tensor.fill_(step)
        elif name.startswith("optimizer."):
            tensor.copy_(tensors[name.split(".", 2)[2]] * 0.5)
    return tensors


def digest_whole(tensors: dict[str, Tensor]) -> str:
    return digest({name: whole(tensor) for name, tensor in tensors.items()})


def save_all(ranks: Ranks, root: Path, steps: tuple[int, ...], keep: int = 3) -> list[Any]:
    """Save states of several steps through one saver; return the digest of each and reports."""
    tensors = scrambled(ranks, steps[0])
    reports: list[tuple[str, dict[str, Any]]] = []
    tokenizer = root / "tokenizer.model"
    saver = Saver(
        root / "checkpoints",
        tensors,
        Origin(TINY, "recipe-hash", tokenizer, {"torch": torch.__version__}),
        ranks,
        keep=keep,
        report=lambda kind, **fields: reports.append((kind, fields)),
    )
    digests = {}
    for step in steps:
        for name, tensor in scrambled(ranks, step).items():
            tensors[name].copy_(tensor)
        digests[step] = digest_whole(tensors)
        saver.save(RunState(step, step * 10, step * 160))
        for tensor in tensors.values():
            tensor.zero_()  # training goes on at once: the snapshot must not see it
    saver.close()
    return [digests, reports]


def load_newest(ranks: Ranks, root: Path, cfg: Model = TINY) -> tuple[Any, str, list[str]]:
    tensors = scrambled(ranks, 99, cfg)
    rejected: list[str] = []
    state = restore(
        root / "checkpoints", tensors, cfg, ranks, reject=lambda _, why: rejected.extend(why)
    )
    return state, digest_whole(tensors), rejected


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Three checkpoints that two ranks wrote; copied before anyone damages them."""
    root = tmp_path_factory.mktemp("saved")
    (root / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    (digests, _), _ = on_ranks(2, save_all, root, STEPS)
    return root, digests


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_save_then_load_is_the_identity_at_any_world_size(saved: Saved, world_size: int) -> None:
    root, digests = saved
    for state, loaded, rejected in on_ranks(world_size, load_newest, root):
        assert state == RunState(3, 30, 480)
        assert loaded == digests[3]
        assert not rejected


def test_nothing_saved_loads_nothing(tmp_path: Path) -> None:
    (found,) = on_ranks(1, load_newest, tmp_path)
    assert found[0] is None


def test_weights_read_without_a_process_group_are_the_saved_ones(saved: Saved) -> None:
    root, _ = saved
    weights = open_weights(step_directory(root / "checkpoints", 3))
    (whole_weights,) = on_ranks(1, weights_of_step, 3)
    assert {name: weights.read(name).shape for name in weights.shapes} == {
        name: tensor.shape for name, tensor in whole_weights.items()
    }
    assert digest({name: weights.read(name) for name in weights.shapes}) == digest(whole_weights)


def weights_of_step(ranks: Ranks, step: int) -> dict[str, Tensor]:
    tensors = scrambled(ranks, step)
    return {n: whole(t) for n, t in tensors.items() if not n.startswith("optimizer.")}


def test_retention_keeps_the_newest(root: Path) -> None:
    on_ranks(1, save_all, root, (1, 2, 3, 4), 2)
    assert [path.name for path in committed(root / "checkpoints")] == [
        "step-00000004",
        "step-00000003",
    ]


def flip_a_bit(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(payload)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["step"] = "three"
    path.write_text(json.dumps(manifest))


def flip_a_digit(path: Path) -> None:
    text = path.read_text()
    assert '"samples": 30' in text
    path.write_text(text.replace('"samples": 30', '"samples": 20'))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("weights-00001-of-00002.safetensors", flip_a_bit, "its bytes have changed"),
    ("optimizer-00002-of-00002.safetensors", flip_a_bit, "its bytes have changed"),
    ("weights-00002-of-00002.safetensors", truncate, "bytes, not"),
    ("optimizer-00001-of-00002.safetensors", Path.unlink, "is missing"),
    ("tokenizer.model", flip_a_bit, "its bytes have changed"),
    (MANIFEST, Path.unlink, "is missing"),
    (MANIFEST, truncate, "manifest.json"),
    (MANIFEST, edit_manifest, "not a manifest"),
    (MANIFEST, flip_a_digit, "its bytes have changed"),
]


@pytest.mark.parametrize(("name", "harm", "said"), DAMAGE)
def test_a_damaged_checkpoint_is_never_loaded_and_the_one_before_is(
    copy: Path, saved: Saved, name: str, harm: Callable[[Path], None], said: str
) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    harm(newest / name)
    assert any(said in problem for problem in verify_all(copy)[newest])
    assert newest_sound(copy)[0].name == "step-00000002"
    results = on_ranks(2, load_newest, copy)
    for state, loaded, _ in results:
        assert state.step == 2
        assert loaded == saved[1][2]
    assert any(said in why for *_, rejected in results for why in rejected)
    assert not newest.exists(), "set aside, so that a later save of step 3 has its place"
    assert newest.with_name("step-00000003.corrupt").is_dir()


def test_a_file_that_the_manifest_does_not_name_is_damage(copy: Path) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    shutil.copy(newest / "weights-00001-of-00002.safetensors", newest / "extra.safetensors")
    assert damage(newest, read_manifest(newest)) == ["extra.safetensors: is not in the manifest"]


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a stranger would do: a manifest of his own, with its hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", "..", ".hidden"])
def test_a_manifest_cannot_name_files_elsewhere(copy: Path, name: str) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][0]["name"] = name
    (newest / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError, match="plain file name"):
        read_manifest(newest)


def test_when_all_are_damaged_the_run_says_so_and_deletes_none(copy: Path) -> None:
    for directory in committed(copy / "checkpoints"):
        flip_a_bit(directory / "weights-00001-of-00002.safetensors")
    for _ in range(2):  # asked again, it must not quietly begin from nothing
        (said,) = on_ranks(1, error_of_load, copy)
        assert "all 3 checkpoints are damaged" in said
    assert len(list((copy / "checkpoints").glob("*.corrupt"))) == len(STEPS)


def error_of_load(ranks: Ranks, root: Path, cfg: Model = TINY) -> str:
    try:
        load_newest(ranks, root, cfg)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_model_is_refused_by_key(copy: Path) -> None:
    other = Model(d_model=32, n_heads=4, n_layers=3, max_seq_len=16, vocab_size=97)
    (said,) = on_ranks(1, error_of_load, copy, other)
    assert "model.n_layers: checkpoint 2, recipe 3" in said
    assert committed(copy / "checkpoints")[0].name == "step-00000003", "it is not damaged"


def die_while_saving(ranks: Ranks, root: Path, syscall: str, nth: int) -> None:
    """Save step 4, and die at the nth call of a function that makes things durable."""
    real, calls = getattr(os, syscall), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, syscall, deadly)
    save_all(ranks, root, (4,))


@pytest.mark.parametrize(
    ("syscall", "nth"),
    [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4), ("rename", 1), ("rename", 3)],
)
def test_death_half_way_through_a_save_leaves_the_one_before(
    copy: Path, saved: Saved, syscall: str, nth: int
) -> None:
    with pytest.raises(AssertionError, match="died without a word"):
        on_ranks(1, die_while_saving, copy, syscall, nth)
    assert [path.name for path in committed(copy / "checkpoints")][0] == "step-00000003"
    ((state, loaded, rejected),) = on_ranks(1, load_newest, copy)
    assert (state.step, loaded, rejected) == (3, saved[1][3], [])


def save_where_nothing_can_be_written(ranks: Ranks, root: Path) -> tuple[list[Any], str]:
    tensors = scrambled(ranks, 4)
    reports: list[Any] = []
    blocked = root / "checkpoints"
    if ranks.is_first:
        blocked.write_text("a file where the directory should be")
    saver = Saver(
        blocked,
        tensors,
        Origin(TINY, "", root / "tokenizer.model", {}),
        ranks,
        keep=3,
        report=lambda kind, **fields: reports.append((kind, fields["why"])),
    )
    saver.save(RunState(4, 40, 640))
    try:
        saver.close()
    except CheckpointError as error:
        return reports, str(error)
    return reports, ""


def test_a_save_that_fails_is_reported_and_raised_at_the_end_on_all_ranks(root: Path) -> None:
    for reports, raised in on_ranks(2, save_where_nothing_can_be_written, root):
        assert [kind for kind, _ in reports] == ["checkpoint_failed"]
        assert "the save of step 4 failed" in raised


def save_while_saving(ranks: Ranks, root: Path) -> dict[int, str]:
    """Ask for a second save while the first is still being written."""
    from mpt.checkpoint import save

    at_work, may_go_on = threading.Event(), threading.Event()
    real = vars(save)["write_tensors"]

    def slow(*args: Any) -> Any:
        at_work.set()
        assert may_go_on.wait(timeout=60)
        return real(*args)

    vars(save)["write_tensors"] = slow
    tensors = scrambled(ranks, 1)
    origin = Origin(TINY, "", root / "tokenizer.model", {})
    checkpoints = root / "checkpoints"
    saver = Saver(checkpoints, tensors, origin, ranks, keep=3, report=lambda *_, **__: None)
    digests = {1: digest_whole(tensors)}
    saver.save(RunState(1, 10, 160))
    assert at_work.wait(timeout=60)
    for name, tensor in scrambled(ranks, 2).items():
        tensors[name].copy_(tensor)
    digests[2] = digest_whole(tensors)
    second = threading.Thread(target=saver.save, args=(RunState(2, 20, 320),))
    second.start()
    second.join(timeout=1.0)  # long enough to overwrite the snapshot, if it did not wait
    may_go_on.set()
    second.join()
    saver.close()
    return digests


def load_step(ranks: Ranks, root: Path, step: int) -> str:
    tensors = scrambled(ranks, 99)
    read_tensors(tensors, step_directory(root / "checkpoints", step))
    return digest_whole(tensors)


def test_a_second_save_waits_for_the_first_and_neither_sees_the_other(root: Path) -> None:
    (digests,) = on_ranks(1, save_while_saving, root)
    for step, expected in digests.items():
        assert on_ranks(1, load_step, root, step) == [expected]


def fail_to_commit_on_the_first_rank(ranks: Ranks, root: Path) -> tuple[list[str], str]:
    """A failure that nobody foresaw, on one rank, between two collectives."""
    reports: list[str] = []
    saver = Saver(
        root / "checkpoints",
        scrambled(ranks, 1),
        Origin(TINY, "", root / "tokenizer.model", {"not": object()}),  # type: ignore[dict-item]
        ranks,
        keep=3,
        report=lambda kind, **fields: reports.append(kind),
    )
    saver.save(RunState(1, 10, 160))
    try:
        saver.close()
    except CheckpointError as error:
        return reports, str(error)
    return reports, ""


def test_an_unforeseen_failure_of_one_rank_is_raised_on_all_and_none_waits(root: Path) -> None:
    results = on_ranks(2, fail_to_commit_on_the_first_rank, root)
    assert "TypeError" in results[0][1]
    assert "another rank" in results[1][1]
    assert [reports for reports, _ in results] == [["checkpoint_failed"]] * 2


def die_while_the_first_rank_commits(ranks: Ranks, root: Path) -> None:
    if not ranks.is_first:
        real = Saver._gather

        def deadly(self: Saver, files: Any) -> Any:
            real(self, files)
            os.kill(os.getpid(), signal.SIGKILL)

        Saver._gather = deadly  # type: ignore[method-assign]
    save_all(ranks, root, (4,))


def test_death_of_a_peer_during_the_commit_leaves_a_whole_checkpoint(copy: Path) -> None:
    with pytest.raises(AssertionError):
        on_ranks(2, die_while_the_first_rank_commits, copy)
    ((state, _, rejected),) = on_ranks(1, load_newest, copy)
    assert state.step in (3, 4)
    assert not rejected


def test_leftovers_of_dead_saves_are_swept_up_by_the_next(copy: Path) -> None:
    leftover = copy / "checkpoints" / "step-00000002.partial"
    leftover.mkdir()
    (leftover / "weights").write_text("half")
    on_ranks(1, save_all, copy, (4,))
    assert not leftover.exists()


def test_an_export_needs_no_optimizer(copy: Path) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    (newest / "optimizer-00001-of-00002.safetensors").unlink()
    assert newest_sound(copy, kinds=("weights", "tokenizer"))[0] == newest
    assert newest_sound(copy)[0] != newest
