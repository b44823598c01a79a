"""From a recipe to a sharded model and its optimizer: the order of construction, in one place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mpt.dist import Ranks, min_over_ranks
from mpt.model.attend import choose_backend
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.optim import build_optimizer
from mpt.recipe import Recipe
from mpt.recipe.budget import (
    Precision,
    auto_microbatch_size,
    flops_per_token,
    state_bytes_per_rank,
)

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

MEMORY_SHARE = 0.6
"""Of a device's memory that the estimate may fill: it leaves out what allocators and libraries
take on top."""

COMPILE_PAYS_FLOPS = 3e14
"""On CPU, compiling took 30 to 40 s of two cores and gave back 15 to 30 %. A run of this many
FLOPs lasts a quarter of an hour there; a shorter one ends sooner without."""


def build(recipe: Recipe, ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model, sharded over all ranks and freshly initialised, and its optimizer.

    The order matters: blocks are compiled before they are sharded, sharded before memory is
    taken, and initialised by rows, so that no rank ever holds the whole model.
    """
    with torch.device("meta"):
        model = MPT(recipe.model, choose_backend(ranks.device))
    if should_compile(recipe, ranks.device):
        for block in model.transformer.blocks:
            block.compile(fullgraph=True)
    policy = _mixed_precision(choose_precision(recipe.train.precision, ranks.device))
    for block in model.transformer.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    # The tied embedding, the last norm and the head are the root's own unit.
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    initialise(model, recipe.model, recipe.seed)
    return model, build_optimizer(model, recipe.optimizer)


def choose_precision(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Precision:
    """Return the compute dtype; auto is bf16 where the device has it in hardware."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def should_compile(recipe: Recipe, device: torch.device) -> bool:
    """Return whether to compile blocks; auto weighs what it costs against the run's length."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    if device.type == "cuda":
        return True
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.model.max_seq_len
    long_enough = tokens * flops_per_token(recipe.model) >= COMPILE_PAYS_FLOPS
    return long_enough and shutil.which("g++") is not None


def choose_microbatch_size(recipe: Recipe, ranks: Ranks) -> int:
    """Return the samples per forward pass; auto is the most that should fit, up to the share.

    The update does not depend on it beyond rounding, so a run may go on on other hardware.
    """
    share = -(-recipe.train.global_batch_size // ranks.world_size)
    if recipe.train.microbatch_size != "auto":
        return min(recipe.train.microbatch_size, share)
    state_bytes = state_bytes_per_rank(recipe.model, ranks.world_size)
    return auto_microbatch_size(
        recipe.model,
        share=share,
        budget_bytes=int(MEMORY_SHARE * _memory_bytes(ranks)) - state_bytes,
        precision=choose_precision(recipe.train.precision, ranks.device),
    )


def _memory_bytes(ranks: Ranks) -> int:
    """Memory that this rank may count on: its GPU's, or its part of the host's.

    All of it, not what happens to be free: a resumed run must choose as it did before, or its
    sums are in another order and its bits differ.
    """
    if ranks.device.type == "cuda":
        return int(torch.cuda.get_device_properties(ranks.device).total_memory)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # All ranks must choose alike, and machines may differ.
    return min_over_ranks(min(host, _container_limit_bytes()) // local_world_size)


def _container_limit_bytes() -> int:
    """The memory limit of this container (cgroup v2), which the kernel's total does not know."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return 1 << 62


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; elsewhere fp32 is as fast, and more exact."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Compute in `precision`, reduce gradients in fp32; master weights are fp32 either way."""
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
