"""A copy of the training state in host memory: the only part of a save that training waits for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mpt.dist import local_tensor


class Snapshot:
    """Host buffers for one copy of the state, allocated once and filled again for each save.

    Fresh memory would cost more than the copy: its pages are zeroed by the kernel one by one
    (1.05 s against 0.08 s for 1.5 GB).
    """

    def __init__(self, tensors: Mapping[str, Tensor], host_mesh: DeviceMesh) -> None:
        self._locals = {name: _buffer(local_tensor(t)) for name, t in tensors.items()}
        self.tensors: dict[str, Tensor] = {
            name: _as_shard_of(tensor, self._locals[name], host_mesh)
            for name, tensor in tensors.items()
        }

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the state into the buffers and return them; returns when the copy is whole."""
        for name, tensor in tensors.items():
            self._locals[name].copy_(local_tensor(tensor), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self.tensors


def _buffer(local: Tensor) -> Tensor:
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)


def _as_shard_of(tensor: Tensor, buffer: Tensor, host_mesh: DeviceMesh) -> Tensor:
    """Present a host buffer as what it is: the same rows of the same whole tensor."""
    if not isinstance(tensor, DTensor):
        return buffer
    return DTensor.from_local(
        buffer,
        host_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
