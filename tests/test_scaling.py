"""Scaling on paper: what the arithmetic owes, and how near it comes to what was published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpt.bench.scaling import Cluster, step
from mpt.recipe.budget import flops_per_token
from mpt.recipe.size import n_parameters
from tests.bench.scaling import PUBLISHED, check, forecast, model_of, predicted

SEVEN = model_of("7b")
ALONE = {"microbatch_size": 4, "mfu_alone": 0.5}


def test_one_gpu_talks_to_nobody() -> None:
    done = step(SEVEN, Cluster(gpus=1), **ALONE)  # type: ignore[arg-type]
    assert (done.communication_s, done.gathered_bytes, done.reduced_bytes) == (0.0, 0.0, 0.0)
    assert done.slowdown == 1.0
    assert done.flops == pytest.approx(flops_per_token(SEVEN) * 4 * 2048)


def test_every_gpu_receives_nearly_all_parameters_twice_and_sends_every_gradient() -> None:
    done = step(SEVEN, Cluster(gpus=1024), **ALONE)  # type: ignore[arg-type]
    assert done.gathered_bytes == pytest.approx(2 * 2 * n_parameters(SEVEN), rel=1e-2)
    assert done.reduced_bytes == pytest.approx(4 * n_parameters(SEVEN), rel=1e-2)


def test_enough_computing_hides_all_but_the_first_gather_and_the_last_reduction() -> None:
    ideal = Cluster(gpus=512, lost_per_doubling=0.0)
    far = step(SEVEN, ideal, microbatch_size=64, mfu_alone=0.5)
    assert far.exposed_s == pytest.approx(far.communication_s / (SEVEN.n_layers + 1) * 3 / 4)
    assert far.exposed_s < 0.01 * far.compute_s


def test_what_is_in_sight_grows_as_computing_shrinks_and_is_never_more_than_all() -> None:
    slow = Cluster(gpus=512, node_bytes_per_s=10e9)
    steps = [step(SEVEN, slow, microbatch_size=size, mfu_alone=0.5) for size in (64, 8, 4, 2, 1)]
    seen = [done.exposed_s for done in steps]
    assert seen == sorted(seen)
    assert seen[-1] > 2 * seen[0]
    assert all(done.exposed_s <= done.communication_s for done in steps)


def test_replicas_gather_within_a_node_whatever_their_number() -> None:
    hybrid = [
        step(SEVEN, Cluster(gpus=n), hybrid=True, **ALONE)  # type: ignore[arg-type]
        for n in (8, 1024)
    ]
    assert hybrid[0].gathered_bytes == hybrid[1].gathered_bytes
    whole = step(SEVEN, Cluster(gpus=8), **ALONE)  # type: ignore[arg-type]
    assert replace(hybrid[0]) == whole


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_decline_is_met_within_four_per_cent(size: str) -> None:
    _, published = PUBLISHED[size]
    for gpus, mfu in published.items():
        assert predicted(size, gpus) == pytest.approx(mfu, rel=0.04)


def test_the_document_shows_what_the_arithmetic_gives() -> None:
    page = (Path(__file__).parent / "bench" / "scaling.md").read_text(encoding="utf-8")
    rows = [*check(), *forecast("7b", 1024 * 2048, hybrid=False)]
    rows += forecast("30b", 2048 * 2048, hybrid=True)
    assert not set(rows) - set(page.splitlines())
