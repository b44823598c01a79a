"""From a recipe to a sharded model and its optimizer: the order of construction, in one place."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mpt.dist import Ranks, min_over_ranks, of_all_ranks
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.optim import build_optimizer
from mpt.recipe import Recipe
from mpt.recipe.activations import Precision
from mpt.recipe.attention import flash_is_installed
from mpt.recipe.fit import Fit
from mpt.recipe.float8 import Float8
from mpt.recipe.machine import Machine, this_cpu, torchao_is_installed

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

_FLOAT8_FROM = (8, 9)
"""Compute capability: Ada, then Hopper and later."""


def build(recipe: Recipe, fit: Fit, ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model, sharded over the mesh of `ranks` and newly initialised, and its optimizer.

    The order matters: products are made 8 bits wide before parts are compiled, parts compiled
    before they are sharded, sharded before memory is taken, and initialised by rows, so that no
    rank ever holds the whole model.
    """
    with torch.device("meta"):
        model = MPT(recipe.model, fit.attention.backend, recipe.train.z_loss, fit.recompute)
    if fit.float8 != "off":
        multiply_in_float8(model.transformer.blocks, fit.float8)
    if fit.compile:
        model.compile_parts()
    policy = _mixed_precision(fit.precision)
    for block in model.transformer.blocks:
        fully_shard(
            block,
            mesh=ranks.mesh,
            mp_policy=policy,
            reshard_after_forward=fit.reshard_after_forward,
        )
    # Embeddings, the last norm and the head are the root's own unit; torch keeps it gathered.
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    initialise(model, recipe.model, recipe.seed)
    return model, build_optimizer(model, recipe.optimizer, DTYPES[fit.precision])


def multiply_in_float8(blocks: nn.Module, how: Float8, *, emulate: bool = False) -> None:
    """Have every linear layer multiply in 8 bits, forward and backward; weights stay as they are.

    Args:
        blocks: on the meta device or not. The head is none of them: its logits stay in bf16.
        emulate: round to 8 bits, but multiply as the hardware at hand can.

    Source:
        Micikevicius et al. 2022, arXiv:2209.05433; torchao's recipes of these names.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(how)
    convert_to_float8_training(blocks, config=replace(recipe, emulate=emulate))


def machine_of(ranks: Ranks) -> Machine:
    """Return what this rank has to train with, the same on all ranks."""
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = _gpu(ranks, n_local) if ranks.device.type == "cuda" else this_cpu(n_local)
    return replace(
        mine,
        name=" and ".join(sorted(set(of_all_ranks(mine.name)))),
        memory_bytes=min_over_ranks(mine.memory_bytes),
        has_bf16=_on_all(mine.has_bf16),
        has_compiler=_on_all(mine.has_compiler),
        has_float8=_on_all(mine.has_float8),
        flash_installed=_on_all(mine.flash_installed),
        torchao_installed=_on_all(mine.torchao_installed),
        ranks_per_node=min_over_ranks(n_local),
    )


def _on_all(claim: bool) -> bool:
    """Whether it holds on all ranks: they must choose alike, and machines may differ."""
    return bool(min_over_ranks(int(claim)))


def _gpu(ranks: Ranks, n_local: int) -> Machine:
    found = torch.cuda.get_device_properties(ranks.device)
    return Machine(
        device="cuda",
        name=found.name,
        memory_bytes=int(found.total_memory),
        has_bf16=bool(torch.cuda.is_bf16_supported(including_emulation=False)),
        has_compiler=True,
        has_float8=torch.cuda.get_device_capability(ranks.device) >= _FLOAT8_FROM,
        flash_installed=flash_is_installed(),
        torchao_installed=torchao_is_installed(),
        ranks_per_node=n_local,
    )


def _mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Compute in `precision`, reduce gradients in fp32; master weights are fp32 either way."""
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[precision],
        reduce_dtype=torch.float32,
        # What a block is given is of the compute dtype already, but for RoPE's angles and ALiBi's
        # slopes, which must stay fp32.
        cast_forward_inputs=False,
    )
