"""A network small enough for a test, built the way training builds it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mpt.dist import Ranks
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.recipe.model import Model

TINY = Model(d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=97)


def sharded(ranks: Ranks, cfg: Model = TINY, seed: int = 3) -> nn.Module:
    """Return an fp32 network, sharded over all ranks, its weights a function of the seed."""
    with torch.device("meta"):
        model = MPT(cfg, "blocks")
    for block in model.transformer.blocks:
        fully_shard(block, mesh=ranks.mesh)
    fully_shard(model, mesh=ranks.mesh)
    assert isinstance(model, FSDPModule)
    model.to_empty(device=ranks.device)
    initialise(model, cfg, seed)
    return model


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights, whole; every rank must call it."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the exact bits of tensors, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
