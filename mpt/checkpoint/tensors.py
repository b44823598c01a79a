"""Tensors to and from safetensors files, sharded over ranks: the two calls into torch's DCP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpt.checkpoint.layout import Kind
from mpt.errors import CheckpointError

KIND_INDEX: dict[Kind, int] = {"weights": 1, "optimizer": 2}
"""DCP numbers the files of a rank; we give each kind a number, and rename."""


def kind_of(name: str) -> Kind:
    """Return which file a tensor belongs in."""
    return "optimizer" if name.startswith("optimizer.") else "weights"


def write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, group: dist.ProcessGroup
) -> dict[Kind, Path]:
    """Write this rank's rows of each tensor into `directory`; every rank of `group` takes part.

    Returns:
        This rank's files. A kind of which it holds no rows has none.

    Raises:
        CheckpointError: on every rank, if any of them failed.
    """
    writer = HuggingFaceStorageWriter(
        str(directory),
        fqn_to_index_mapping={name: KIND_INDEX[kind_of(name)] for name in tensors},
        save_distributed=True,
    )
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except (CheckpointException, OSError, RuntimeError) as error:  # the first is a BaseException
        raise CheckpointError(f"{directory}: {_first_cause(error)}") from error
    shard, last = dist.get_rank(group) + 1, max(KIND_INDEX.values())
    names = {
        kind: directory / f"shard-{shard:05d}-model-{index:05d}-of-{last:05d}.safetensors"
        for kind, index in KIND_INDEX.items()
    }
    return {kind: path for kind, path in names.items() if path.exists()}


def read_tensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill the tensors in place, each rank its own rows, whatever world size wrote the files.

    Raises:
        CheckpointError: on every rank, if a tensor is missing or does not fit.
    """
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: {_first_cause(error)}") from error


def _first_cause(error: BaseException) -> str:
    """Return the sentence that helps: DCP wraps one failure per rank, each with a traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
