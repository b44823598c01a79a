"""Laws of copies of a sharded model (HSDP), on real process groups of 2 x 2 ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mpt.checkpoint.layout import step_directory
from mpt.checkpoint.weights import open_weights
from mpt.dist import Ranks, with_replicas
from mpt.launch.pulse import Phase, anonymous_file
from mpt.state import RunState
from tests.dist.running import DONE, STEPS, STOPPED, assert_one_pass, one_attempt, prepared, run
from tests.dist.saving import (
    digest_whole,
    lean,
    load_newest,
    memory_in,
    save_all,
    scrambled,
    state_at,
)
from tests.dist.test_step import BATCH, after_steps, assert_same, init_digest
from tests.world import on_ranks


def in_rows(ranks: Ranks, replicas: int, work: Any, *args: Any) -> Any:
    return work(with_replicas(ranks, replicas), *args)


@pytest.mark.parametrize("replicas", [2, 4])  # 4: nothing is sharded
def test_the_update_does_not_depend_on_the_number_of_copies(replicas: int) -> None:
    (alone,) = on_ranks(1, after_steps, BATCH)
    results = on_ranks(4, in_rows, replicas, after_steps, 2)
    for result in results:
        assert_same(result, alone)
    for weights, seen in results[1:]:
        assert seen == results[0][1]
        for name, weight in weights.items():
            assert weight.equal(results[0][0][name]), "copies are the same bit for bit"


def test_initial_weights_do_not_depend_on_the_number_of_copies() -> None:
    (alone,) = on_ranks(1, init_digest, 3)
    assert on_ranks(4, in_rows, 2, init_digest, 3) == [alone] * 4


@pytest.fixture(scope="module")
def saved_by_copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    root = tmp_path_factory.mktemp("copies")
    (root / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    (digests, _), *_ = on_ranks(4, in_rows, 2, save_all, root, (3,))
    return root, digests


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (3, 1), (4, 2)])
def test_what_copies_save_loads_anywhere(
    saved_by_copies: tuple[Path, dict[int, str]], world_size: int, replicas: int
) -> None:
    root, digests = saved_by_copies
    for state, loaded, rejected in on_ranks(world_size, in_rows, replicas, load_newest, root):
        assert (state, loaded, rejected) == (state_at(3), digests[3], [])


def test_copies_load_what_others_have_saved(saved: tuple[Path, dict[int, str]]) -> None:
    root, digests = saved  # by two ranks, with no copies
    for state, loaded, _ in on_ranks(4, in_rows, 2, load_newest, root):
        assert (state, loaded) == (state_at(3), digests[3])


def test_each_row_is_saved_by_one_of_the_copies(
    saved_by_copies: tuple[Path, dict[int, str]],
) -> None:
    rows: dict[str, int] = {}
    for path in step_directory(saved_by_copies[0] / "checkpoints", 3).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = file.get_slice(name).get_shape()
                rows[name] = rows.get(name, 0) + (shape[0] if shape else 1)
    assert rows == on_ranks(1, whole_rows)[0]


def whole_rows(ranks: Ranks) -> dict[str, int]:
    tensors = scrambled(ranks, 3)
    return {name: t.shape[0] if t.shape else 1 for name, t in tensors.items()}


def take_and_load(ranks: Ranks, files: list[str]) -> tuple[str, RunState | None, str]:
    tensors = lean(ranks, 5)
    memory = memory_in(files[ranks.rank], tensors, ranks)
    before = digest_whole(tensors)
    memory.take(state_at(5))
    memory.wait()
    for tensor in tensors.values():
        tensor.zero_()
    found = memory.newest_common()
    state = None if found is None else memory.load(found.step)
    return before, state, digest_whole(tensors)


def test_copies_in_memory_are_of_the_ranks_own_rows() -> None:
    descriptors = [anonymous_file("mpt-test") for _ in range(4)]
    files = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors]
    try:
        for before, state, after in on_ranks(4, in_rows, 2, take_and_load, files):
            assert (state, after) == (state_at(5), before)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_run_of_copies_goes_on_without_them_where_it_was_stopped(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    plain = prepared(tmp_path)
    plain = replace(plain, model=replace(plain.model, resid_pdrop=0.0))
    assert run(plain, tmp_path / "alone") == [DONE]
    copies = replace(plain, train=replace(plain.train, replicas=2))
    stopped = on_ranks(4, one_attempt, copies, tmp_path / "run", 0, {}, (Phase.STEP, 6))
    assert stopped == [STOPPED] * 4
    assert on_ranks(3, one_attempt, plain, tmp_path / "run", 1, {}, None) == [DONE] * 3
    assert_one_pass(tmp_path / "run")
    found, expected = (weights_at(tmp_path / name, STEPS) for name in ("run", "alone"))
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def weights_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    weights = open_weights(step_directory(run_dir / "checkpoints", step))
    return {name: weights.read(name) for name in weights.shapes}
