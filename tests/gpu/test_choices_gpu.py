"""On a GPU: a probe measures memory and leaves no trace, and products in 8 bits train."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.dist import Ranks, process_group
from mpt.objective import next_token_loss
from mpt.optim import training_tensors
from mpt.recipe.fit import Machine, fit
from mpt.recipe.float8 import Float8
from mpt.recipe.load import load
from mpt.recipe.probing import MEMORY_LIMIT
from mpt.recipe.recipe import Recipe
from mpt.train.build import build, machine_of
from mpt.train.probe import probe, random_microbatch
from mpt.train.step import train_step
from tests.dist.saving import digest_whole
from tests.gpu.test_gpu import alone  # noqa: F401 - a fixture that acts by itself

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

RECIPE = Path(__file__).parents[2] / "recipes" / "mpt-125m.yaml"


def two_blocks(**train: Any) -> Recipe:
    cfg = load(RECIPE, ["model.n_layers=2", "train.microbatch_size=auto", "train.compile=false"])
    return replace(cfg, train=replace(cfg.train, **train))


def test_a_probe_measures_what_sizes_take_and_leaves_no_trace() -> None:
    with process_group() as ranks:
        cfg, machine = two_blocks(global_batch_size=16), machine_of(ranks)
        chosen = replace(fit(cfg, machine, 1), microbatch_size=4)
        model, optimizer = build(cfg, chosen, ranks)
        before = digest_on_host(model, optimizer)
        resident = torch.cuda.memory_allocated()
        found, tried = probe(model, cfg, machine, chosen, ranks, beat=lambda: None)
        assert digest_on_host(model, optimizer) == before
        assert torch.cuda.memory_allocated() <= resident + (1 << 20), "gradients are dropped"
        assert found.microbatch_size in [each.microbatch_size for each in tried]
        for each in tried:
            assert each.resident_bytes is not None
            assert each.peak_bytes is not None
            assert resident <= each.resident_bytes < each.peak_bytes
            assert each.peak_bytes <= MEMORY_LIMIT * machine.memory_bytes


def digest_on_host(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    return digest_whole({n: t.cpu() for n, t in training_tensors(model, optimizer).items()})


@pytest.mark.parametrize("how", ["tensorwise", "rowwise"])
def test_products_in_8_bits_train_as_those_in_bf16_to_begin_with(how: Float8) -> None:
    pytest.importorskip("torchao", reason="is an extra: float8")
    with process_group() as ranks:
        machine = machine_of(ranks)
        if not machine.has_float8:
            pytest.skip("this GPU has no products in 8 bits")
        plain, rounded = losses(ranks, machine, "off"), losses(ranks, machine, how)
        assert all(map(math.isfinite, rounded))
        assert rounded == pytest.approx(plain, abs=0.1)


def losses(ranks: Ranks, machine: Machine, how: Float8) -> list[float]:
    cfg = two_blocks(global_batch_size=4, float8=how)
    model, optimizer = build(cfg, fit(cfg, machine, 1), ranks)
    batch = [random_microbatch(cfg, 4, ranks)]
    steps = (train_step(model, optimizer, batch, next_token_loss, max_grad_norm=1.0) for _ in "123")
    return [float(taken.loss) for taken in steps]
