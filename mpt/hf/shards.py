"""Weights as safetensors files of bounded size, named and indexed as Hugging Face does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    name: str
    tensors: tuple[str, ...]


def plan(sizes_bytes: Mapping[str, int], shard_bytes: int) -> list[Shard]:
    """Return which file gets which tensors: in order, each file as full as `shard_bytes` allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes_bytes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(names))
        for i, names in enumerate(groups, start=1)
    ]


def write_shards(
    directory: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int
) -> dict[str, Any] | None:
    """Write the weights, holding one file's tensors at a time.

    Returns:
        The content of the index, or None for a single file, which needs none.

    Raises:
        CheckpointError: if a weight is not finite, or is not any more as `dtype`.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in sorted(weights.shapes.items())}
    shards = plan(sizes, shard_bytes)
    for shard in shards:
        # Nothing here keeps the tensors of one file while those of the next are read.
        save_file(
            {name: _finite(weights, name, dtype) for name in shard.tensors},
            directory / shard.name,
            metadata={"format": "pt"},
        )
    if len(shards) == 1:
        return None
    return {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }


def _finite(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    stored = weights.read(name)
    tensor = stored.to(dtype).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        largest = stored.abs().max().item()
        raise CheckpointError(
            f"{weights.directory}: {name} is not finite as {dtype} (its largest value is "
            f"{largest:g}); export as fp32, or from a checkpoint before the run diverged."
        )
    return tensor
