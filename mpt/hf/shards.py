"""Weights as safetensors files of bounded size, named and indexed as Hugging Face does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt.checkpoint.stream import Form, share_out, write_file
from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError
from mpt.hf.names import Part


def write_shards(
    directory: Path,
    weights: Weights,
    parts: dict[str, Part],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> dict[str, Any] | None:
    """Write the weights by their names in transformers, one tensor in memory at a time.

    Args:
        parts: what each tensor there is, in terms of ours.
        dtype: None leaves each as it is stored.

    Returns:
        The content of the index, or None for a single file, which needs none.

    Raises:
        CheckpointError: if a weight is not finite, or is not any more as `dtype`.
    """
    forms = {
        name: Form(dtype or weights.dtype(part.name), part.shape)
        for name, part in sorted(parts.items())
    }
    groups = share_out(forms, shard_bytes)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [
            f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
        ]
    for name, group in zip(names, groups, strict=True):
        write_file(
            directory / name,
            {there: forms[there] for there in group},
            lambda there: finite(weights, parts[there], forms[there].dtype),
        )
    if len(groups) == 1:
        return None
    homes = {there: name for name, group in zip(names, groups, strict=True) for there in group}
    total = sum(form.n_bytes for form in forms.values())
    return {"metadata": {"total_size": total}, "weight_map": homes}


def finite(weights: Weights, part: Part, dtype: torch.dtype) -> Tensor:
    """Return a part of the weights as `dtype`.

    Raises:
        CheckpointError: if a number in it is not finite.
    """
    stored = weights.read(part.name, part.rows)
    tensor = stored.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        largest = stored.abs().max().item()
        raise CheckpointError(
            f"{weights.directory}: {part.name} is not finite as {dtype} (its largest value is "
            f"{largest:g}); export as fp32, or from a checkpoint before the run diverged."
        )
    return tensor
