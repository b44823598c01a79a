"""Laws of runs that skip bad samples: the same update at any world size, one count, one end."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpt.checkpoint.layout import read_manifest, step_directory
from mpt.dist import Ranks
from mpt.errors import DataError
from mpt.launch.pulse import Phase
from mpt.log import read_lines
from mpt.recipe.recipe import Recipe
from mpt.rundir import EVENTS, METRICS
from tests.data.cases import write_dataset
from tests.dist.running import SAMPLES, STEPS, one_attempt, prepared, run
from tests.world import on_ranks

N = 50
BAD = (3, 17, 18, 40)
"""Of the samples, by number; 18 steps of 4 samples read the dataset once and nearly a half."""


def with_bad(root: Path, budget: int = 100) -> Recipe:
    """A recipe of a dataset with bad samples, which are skipped."""
    cfg = prepared(root)
    samples = np.random.default_rng(1).integers(0, 300, (N, 16))
    samples[list(BAD), 7] = 300
    if not (root / "spoilt").exists():
        write_dataset(root / "spoilt", samples)
    streams = {"only": replace(cfg.data.streams["only"], path=f"{root}/spoilt")}
    data = replace(cfg.data, streams=streams, on_bad_sample="skip", bad_sample_budget=budget)
    # No dropout: it is drawn by each rank for itself.
    return replace(cfg, data=data, model=replace(cfg.model, resid_pdrop=0.0))


def told(run_dir: Path) -> Counter[tuple[int, str, int]]:
    """How often each step has told of each sample it skipped."""
    events = (e for e in read_lines(run_dir / EVENTS) if e["event"] == "bad_sample")
    return Counter((e["step"], Path(e["shard"]).name, e["row"]) for e in events)


def losses(run_dir: Path) -> list[float]:
    last = {m["step"]: m["loss"] for m in read_lines(run_dir / METRICS) if "loss" in m}
    return [last[step] for step in range(1, STEPS + 1)]


def counted(run_dir: Path, step: int = STEPS) -> int:
    return read_manifest(step_directory(run_dir / "checkpoints", step)).state.bad_samples


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    root = tmp_path_factory.mktemp("alone")
    cfg = with_bad(root)
    assert run(cfg, root / "run") == ["done"]
    return cfg, root / "run"


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_updates_and_the_count_are_the_same_at_any_world_size(
    alone: tuple[Recipe, Path], tmp_path: Path, world_size: int
) -> None:
    cfg, one = alone
    assert run(cfg, tmp_path / "run", nproc=world_size) == ["done"]
    assert told(tmp_path / "run") == told(one)
    assert counted(tmp_path / "run") == counted(one) == told(one).total() > len(BAD)
    assert np.allclose(losses(tmp_path / "run"), losses(one), rtol=1e-4)


def test_steps_that_are_taken_again_are_not_counted_again(
    alone: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cfg, one = alone
    run_dir = tmp_path / "run"
    every = cfg.checkpoint.every_steps
    step = next(step for step, _, _ in sorted(told(one)) if 1 < step < STEPS and step % every)

    def lose_the_newest(number: int) -> None:
        if number:
            shutil.rmtree(step_directory(run_dir / "checkpoints", step))

    stops = [(Phase.STEP, step - 1)]
    ends = run(cfg, run_dir, nproc=2, stops=stops, before=lose_the_newest)
    assert ends == ["stopped", "done"]
    again = {key: n for key, n in told(run_dir).items() if n > 1}
    assert {at for at, _, _ in again} >= {step}
    assert set(told(run_dir)) == set(told(one))
    assert counted(run_dir) == counted(one)


def ends_with(ranks: Ranks, cfg: Recipe, run_dir: Path) -> tuple[int, str]:
    """Return the exit code and the last words of a rank whose run ends with bad data."""
    with pytest.raises(DataError) as caught:
        one_attempt(ranks, cfg, run_dir, 0, {}, None)
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("world_size", [1, 3])
def test_too_many_end_the_run_on_all_ranks_alike_with_the_list(
    alone: tuple[Recipe, Path], tmp_path: Path, world_size: int
) -> None:
    cfg, one = alone
    (tmp_path / "run").mkdir()
    budget = 2
    cfg = replace(cfg, data=replace(cfg.data, bad_sample_budget=budget))
    ends = on_ranks(world_size, ends_with, cfg, tmp_path / "run")
    assert len(set(ends)) == 1
    code, words = ends[0]
    assert code == 3
    in_order = sorted(told(one).elements())
    assert f"bad samples were skipped, and data.bad_sample_budget is {budget}." in words
    for _, shard, row in in_order[: budget + 1]:
        assert f"/{shard}: row {row}: token id 300 is outside" in words
    last = max(m["step"] for m in read_lines(tmp_path / "run" / METRICS) if "loss" in m)
    assert last == in_order[budget][0]  # no step more than the one that was too many


def test_a_step_of_bad_samples_alone_changes_nothing(tmp_path: Path) -> None:
    cfg = with_bad(tmp_path)
    write_dataset(tmp_path / "hopeless", np.full((N, 16), 300))
    streams = {"only": replace(cfg.data.streams["only"], path=f"{tmp_path}/hopeless")}
    cfg = replace(cfg, data=replace(cfg.data, streams=streams, bad_sample_budget=2 * SAMPLES - 1))
    (tmp_path / "run").mkdir()
    ((code, words),) = on_ranks(1, ends_with, cfg, tmp_path / "run")
    assert (code, words.split()[0]) == (3, str(2 * SAMPLES))
    applied = [m["applied"] for m in read_lines(tmp_path / "run" / METRICS) if "loss" in m]
    assert applied == [False, False]
