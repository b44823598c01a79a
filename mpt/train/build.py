"""From a recipe to a sharded model and its optimizer: the order of construction, in one place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mpt.dist import Ranks, min_over_ranks
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.optim import build_optimizer
from mpt.recipe import Recipe
from mpt.recipe.activations import Precision
from mpt.recipe.attention import flash_is_installed
from mpt.recipe.fit import Fit, Machine

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(recipe: Recipe, fit: Fit, ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model, sharded over all ranks and freshly initialised, and its optimizer.

    The order matters: parts are compiled before they are sharded, sharded before memory is
    taken, and initialised by rows, so that no rank ever holds the whole model.
    """
    with torch.device("meta"):
        model = MPT(recipe.model, fit.attention.backend, recipe.train.z_loss, fit.recompute)
    if fit.compile:
        model.compile_parts()
    policy = _mixed_precision(fit.precision)
    for block in model.transformer.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    # Embeddings, the last norm and the head are the root's own unit.
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    initialise(model, recipe.model, recipe.seed)
    return model, build_optimizer(model, recipe.optimizer)


def machine_of(ranks: Ranks) -> Machine:
    """Return what this rank has to train with, the same on all ranks."""
    on_gpu = ranks.device.type == "cuda"
    return Machine(
        device="cuda" if on_gpu else "cpu",
        memory_bytes=_memory_bytes(ranks),
        has_bf16=_on_all(_gpu_has_bf16() if on_gpu else _cpu_has_bf16()),
        has_compiler=_on_all(on_gpu or shutil.which("g++") is not None),
        flash_installed=_on_all(on_gpu and flash_is_installed()),
    )


def _on_all(claim: bool) -> bool:
    """Whether it holds on all ranks: they must choose alike, and machines may differ."""
    return bool(min_over_ranks(int(claim)))


def _memory_bytes(ranks: Ranks) -> int:
    """Memory that every rank may count on: its GPU's, or its part of the host's."""
    if ranks.device.type == "cuda":
        return min_over_ranks(int(torch.cuda.get_device_properties(ranks.device).total_memory))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min_over_ranks(min(host, _container_limit_bytes()) // local_world_size)


def _container_limit_bytes() -> int:
    """The memory limit of this container (cgroup v2), which the kernel's total does not know."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return 1 << 62


def _gpu_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; elsewhere fp32 is as fast, and more exact."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Compute in `precision`, reduce gradients in fp32; master weights are fp32 either way."""
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[precision],
        reduce_dtype=torch.float32,
        # What a block is given is of the compute dtype already, but for RoPE's angles and ALiBi's
        # slopes, which must stay fp32.
        cast_forward_inputs=False,
    )
