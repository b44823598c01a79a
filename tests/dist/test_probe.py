"""Laws of the probe: the run does not notice it, and a restart chooses as the start did."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.checkpoint.layout import committed, read_manifest
from mpt.dist import Ranks
from mpt.launch.pulse import Phase
from mpt.optim import training_tensors
from mpt.recipe.fit import Fit, fit
from mpt.recipe.recipe import Recipe
from mpt.rundir import CHOSEN, EVENTS
from mpt.train.build import build, machine_of
from mpt.train.probe import probe
from tests.dist.running import STOPPED, final, one_attempt, prepared
from tests.dist.saving import digest_whole
from tests.world import on_ranks

STOP_AT = 3
LONG = 5000
"""Steps of a run in which a probe pays; it is stopped long before."""


def long_run(root: Path, **train: Any) -> Recipe:
    cfg = prepared(root)
    settings: dict[str, Any] = {"steps": LONG, "microbatch_size": "auto", "compile": False} | train
    checkpoint = replace(cfg.checkpoint, every_steps=1)
    return replace(cfg, train=replace(cfg.train, **settings), checkpoint=checkpoint)


def begin(cfg: Recipe, run_dir: Path, nproc: int = 1, number: int = 0, stop: int = STOP_AT) -> None:
    """Take the first steps of a run, or the next ones: at least two, up to `stop`."""
    run_dir.mkdir(exist_ok=True)
    ends = on_ranks(nproc, one_attempt, cfg, run_dir, number, {}, (Phase.STEP, stop - 1))
    assert ends == [STOPPED] * nproc


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / EVENTS).read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def probed(ranks: Ranks, cfg: Recipe) -> tuple[Any, ...]:
    machine = machine_of(ranks)
    chosen: Fit = fit(cfg, machine, ranks.world_size)
    model, optimizer = build(cfg, chosen, ranks)
    tensors = training_tensors(model, optimizer)
    torch.manual_seed(5 + ranks.rank)
    before, numbers = digest_whole(tensors), torch.get_rng_state()
    beats: list[int] = []
    found, tried = probe(model, cfg, machine, chosen, ranks, beat=lambda: beats.append(1))
    same = digest_whole(tensors) == before and torch.equal(torch.get_rng_state(), numbers)
    left = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(beats) == len(tried)
    return found, tried, same, left


def test_weights_moments_and_random_numbers_are_as_they_were(tmp_path: Path) -> None:
    results = on_ranks(2, probed, long_run(tmp_path))
    for found, tried, same, left in results:
        assert same
        assert not left, "gradients of the probe"
        assert [each.microbatch_size for each in tried] == [2, 1]
        assert found.microbatch_size in (1, 2)
    assert results[0][:2] == results[1][:2], "ranks agree on what they saw"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Two ranks that have timed sizes and taken the first steps."""
    root = tmp_path_factory.mktemp("probe")
    cfg = long_run(root)
    begin(cfg, root / "run", nproc=2)
    return cfg, root / "run"


def test_a_probed_run_is_the_one_with_that_size_given_by_hand(
    begun: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cfg, run_dir = begun
    (chosen,) = events(run_dir, "chosen")
    assert chosen["by"] == "probe"
    size = chosen["microbatch_size"]
    by_hand = replace(cfg, train=replace(cfg.train, microbatch_size=size))
    begin(by_hand, tmp_path / "by-hand", nproc=2)
    assert events(tmp_path / "by-hand", "chosen")[0]["by"] == "estimate"
    assert final(run_dir, STOP_AT) == final(tmp_path / "by-hand", STOP_AT)


def copy_of(run_dir: Path, copy: Path) -> Path:
    shutil.copytree(run_dir, copy)
    return copy


def pretend(path: Path, **changes: Any) -> dict[str, Any]:
    """Change what is remembered, so that it cannot be what a probe or the estimate came to."""
    content = json.loads(path.read_text())
    content["choices"][0]["chosen"].update(changes)
    path.write_text(json.dumps(content))
    chosen: dict[str, Any] = content["choices"][0]["chosen"]
    return chosen


def test_a_restart_takes_what_was_remembered_also_before_the_first_checkpoint(
    begun: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cfg, run_dir = begun
    copy = copy_of(run_dir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    wanted = pretend(copy / CHOSEN, reduce_gradients="each", reshard_after_forward=True)
    begin(cfg, copy, nproc=2, number=1)
    first, again = events(copy, "chosen")
    assert again["by"] == "memory"
    assert {key: again[key] for key in wanted} == wanted
    assert {key: first[key] for key in wanted} != wanted, "nothing but the file can have said so"
    manifest = read_manifest(committed(copy / "checkpoints")[0])
    assert manifest.chosen is not None
    assert manifest.chosen["chosen"] == wanted


def test_a_checkpoint_that_was_copied_elsewhere_knows_it(
    begun: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cfg, run_dir = begun
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(run_dir / "checkpoints", tmp_path / "elsewhere" / "checkpoints")
    begin(cfg, tmp_path / "elsewhere", nproc=2, number=1, stop=STOP_AT + 2)
    (chosen,) = events(tmp_path / "elsewhere", "chosen")
    assert chosen["by"] == "memory"
    content = read_manifest(committed(run_dir / "checkpoints")[0]).chosen
    assert content is not None
    assert {key: chosen[key] for key in content["chosen"]} == content["chosen"]


def test_another_number_of_workers_chooses_for_itself_and_both_are_kept(
    begun: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cfg, run_dir = begun
    copy = copy_of(run_dir, tmp_path / "run")
    begin(cfg, copy, nproc=1, number=1, stop=STOP_AT + 2)
    assert [event["by"] for event in events(copy, "chosen")] == ["probe", "probe"]
    choices = json.loads((copy / CHOSEN).read_text())["choices"]
    assert [choice["premises"]["world_size"] for choice in choices] == [2, 1]


@pytest.mark.parametrize("harm", ["{", '{"format": 1, "choices": [3, {"premises": 1}]}', "[]"])
def test_a_damaged_memory_is_not_taken_for_one(
    begun: tuple[Recipe, Path], tmp_path: Path, harm: str
) -> None:
    cfg, _ = begun
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHOSEN).write_text(harm)
    begin(cfg, tmp_path / "run", stop=2)
    assert events(tmp_path / "run", "chosen")[0]["by"] == "probe"


def test_what_cannot_be_remembered_is_as_the_estimate_has_it(tmp_path: Path) -> None:
    cfg = long_run(tmp_path)
    (tmp_path / "run" / CHOSEN).mkdir(parents=True)  # no file can take its place
    begin(cfg, tmp_path / "run", stop=2)
    (chosen,) = events(tmp_path / "run", "chosen")
    assert (chosen["by"], chosen["microbatch_size"]) == ("estimate", 4)
    assert any(CHOSEN in event["why"] for event in events(tmp_path / "run", "warning"))
