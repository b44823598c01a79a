"""Laws of checkpoints, on real process groups and real files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mpt.checkpoint.layout import (
    MANIFEST,
    _seal,
    committed,
    damage,
    newest_sound,
    read_manifest,
    step_directory,
    verify_all,
)
from mpt.checkpoint.tensors import read_tensors
from mpt.checkpoint.weights import open_weights
from mpt.dist import Ranks
from mpt.errors import CheckpointError
from mpt.recipe.model import Model
from tests.disks import make_read_only, small_disk
from tests.dist.saving import (
    STEPS,
    Saved,
    digest_whole,
    load_newest,
    save_all,
    saver_in,
    scrambled,
    state_at,
)
from tests.tiny_model import TINY, digest, whole
from tests.world import on_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_save_then_load_is_the_identity_at_any_world_size(saved: Saved, world_size: int) -> None:
    root, digests = saved
    for state, loaded, rejected in on_ranks(world_size, load_newest, root):
        assert state == state_at(3)
        assert loaded == digests[3]
        assert not rejected


def test_a_checkpoint_of_another_format_is_refused_and_stays(saved: Saved, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(saved[0], copy)
    newest = step_directory(copy / "checkpoints", 3)
    content = json.loads((newest / MANIFEST).read_text()) | {"format": 2}
    del content["sha256"]
    content["sha256"] = _seal(content)
    (newest / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Exception, match="format 2 is not"):
        on_ranks(2, load_newest, copy)
    assert newest.is_dir(), "it is whole, and another version's"


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
    manifest["state"]["step"] = 30
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


WHOLE = state_at(3).to_json()
NO_STATES = [None, 7, {}, {"step": 3}, *({**WHOLE, "samples": bad} for bad in (-1, 3.0, True, "3"))]


@pytest.mark.parametrize("state", NO_STATES, ids=str)
def test_a_manifest_cannot_hold_something_else_for_a_state(copy: Path, state: Any) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    manifest = json.loads((newest / MANIFEST).read_text())
    (newest / MANIFEST).write_text(json.dumps(sealed({**manifest, "state": state})))
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(newest)


def test_when_all_are_damaged_the_run_says_so_and_deletes_none(copy: Path) -> None:
    for directory in committed(copy / "checkpoints"):
        flip_a_bit(directory / "weights-00001-of-00002.safetensors")
    for _ in range(2):  # asked again, it must not quietly begin from nothing
        (said,) = on_ranks(1, error_of_load, copy)
        assert "all 3 checkpoints are damaged" in said
    assert len(list((copy / "checkpoints").glob("*.corrupt"))) == len(STEPS)


def test_a_damaged_checkpoint_on_a_read_only_disk_is_passed_over(
    saved: Saved, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", kib=4096) as disk:
        shutil.copytree(saved[0], disk / "run")
        flip_a_bit(step_directory(disk / "run" / "checkpoints", 3) / MANIFEST)
        assert make_read_only(disk)
        for state, loaded, _ in on_ranks(2, load_newest, disk / "run"):
            assert (state, loaded) == (state_at(2), saved[1][2])
        assert make_read_only(disk, read_only=False)
        for step in (1, 2):
            flip_a_bit(step_directory(disk / "run" / "checkpoints", step) / MANIFEST)
        assert make_read_only(disk)
        assert "all 3 checkpoints are damaged" in on_ranks(2, error_of_load, disk / "run")[0]


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
    saver = saver_in(root, tensors, ranks, lambda *_, **__: None)
    digests = {1: digest_whole(tensors)}
    saver.save(state_at(1))
    assert at_work.wait(timeout=60)
    for name, tensor in scrambled(ranks, 2).items():
        tensors[name].copy_(tensor)
    digests[2] = digest_whole(tensors)
    second = threading.Thread(target=saver.save, args=(state_at(2),))
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


def test_an_export_needs_no_optimizer(copy: Path) -> None:
    newest = step_directory(copy / "checkpoints", 3)
    (newest / "optimizer-00001-of-00002.safetensors").unlink()
    assert newest_sound(copy, kinds=("weights", "tokenizer"))[0] == newest
    assert newest_sound(copy)[0] != newest
