"""`mpt bench` measures the step that training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Small, lines

SAME = ("model.resid_pdrop=0.0", "train.precision=fp32")
WHOLE = ("data", "forward", "backward", "optimizer")


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_what_is_measured_are_the_steps_that_training_takes(
    small: Small, tmp_path: Path, nproc: str
) -> None:
    asked = ("--real", "--json", "--nproc", nproc, "--steps", "3", "--warmup", "2")
    done = small.mpt("bench", small.recipe, *SAME, *asked)
    found: dict[str, Any] = json.loads(done.stdout)
    run = ("train.steps=20", "--run-dir", tmp_path / "run", "--nproc", nproc)
    small.mpt("train", small.recipe, *SAME, *run)
    trained = [line["loss"] for line in lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert found["losses"] == trained[:5]
    assert (found["world_size"], found["steps"], found["warmup_steps"]) == (int(nproc), 3, 2)
    step = found["step_s"]
    assert step["least"] <= step["median"] <= step["p95"]
    assert found["tokens_per_second"] == pytest.approx(6 * 32 / step["median"])
    assert set(found["parts_s"]) == set(WHOLE)
    assert all(seconds > 0 for seconds in found["parts_s"].values())
    assert max(found["parts_s"].values()) < step["p95"]
    assert found["peak_memory_bytes"] > 1 << 20


def test_a_table_for_a_person_and_a_sentence_for_what_cannot_be_measured(small: Small) -> None:
    shown = small.mpt("bench", small.recipe, "--steps", "1", "--warmup", "1").stdout
    for word in ("tokens/s", "forward", "peak memory", "attention blocks", "random tokens"):
        assert word in shown
    refused = small.mpt("bench", small.recipe, "train.attention=flex", "--steps", "1", code=2)
    assert "flex has no backward pass on a CPU" in refused.stderr
    missing = small.mpt(
        "bench", small.recipe, "--real", "data.streams.stdlib.path=/nowhere", "--steps", "1", code=3
    )
    assert "/nowhere" in missing.stderr
