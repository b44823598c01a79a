"""Ranks and what they agree on: process group, device mesh, small reductions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mpt.launch.attempt import ATTEMPT, STORE_FD

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""After this a rank stops waiting for its peers, and the attempt ends. Longer than a supervisor's
patience (`launch.hang`): it sees a hang first, and can say who is stuck."""

TEXT_BYTES = 64
"""Of a text that ranks tell each other: a host's name, or a device's."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the workers of a run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """On the device that trains: one dimension over all ranks, or as `with_replicas` makes it."""
    host_mesh: DeviceMesh
    """The same over host memory, for snapshots and small agreements; the same one on CPU."""
    local_world_size: int = 1
    """Ranks on this node; nodes may differ in it."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def of_node(self) -> range:
        """The ranks of this node: consecutive, as launchers count them."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that the launcher's environment names, and leave it at the end.

    After an exception the group is left standing: tearing it down can wait for ever on peers
    that are gone. The process is about to end, and takes its sockets with it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **_rendezvous())
    yield ranks(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # Without it a rank that leaves first can abort one that is still tearing down.
    dist.barrier()
    dist.destroy_process_group()


def _rendezvous() -> dict[str, Any]:
    """Return where ranks meet: on the supervisor's socket, or as torchrun says."""
    if ATTEMPT not in os.environ:
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A socket made before anybody was told its port, and anew for each attempt: nobody can take
    # it, and no rank reads what an earlier attempt has left in a store.
    listening = int(os.environ[STORE_FD]) if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=COLLECTIVE_TIMEOUT,
        master_listen_fd=listening,
    )
    return {"store": store, "rank": rank, "world_size": world_size}


def ranks(device: torch.device, local_rank: int = 0, local_world_size: int = 1) -> Ranks:
    """Describe this process within the process group that is already there."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    host = mesh if device.type == "cpu" else init_device_mesh("cpu", (world_size,))
    rank = dist.get_rank()
    return Ranks(rank, local_rank, world_size, device, mesh, host, local_world_size)


def with_replicas(ranks: Ranks, replicas: int) -> Ranks:
    """Return the same ranks as `replicas` rows, each of which holds the whole model, sharded.

    Ranks of a row follow each other, as those of a node do.
    """
    if replicas == 1:
        return ranks
    shape, names = (replicas, ranks.world_size // replicas), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    on_host = ranks.device.type == "cpu"
    host = mesh if on_host else init_device_mesh("cpu", shape, mesh_dim_names=names)
    return replace(ranks, mesh=mesh, host_mesh=host)


def pick_device(local_rank: int) -> torch.device:
    """Return the GPU of this local rank, or the CPU where there is none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks, in place."""
    dist.all_reduce(value)
    return value


def any_rank(claim: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether the claim holds on any rank: the same answer on all of them."""
    return bool(max_over_ranks(int(claim), group))


def max_over_ranks(value: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the largest of all ranks' values. Through host memory: no device waits."""
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return int(tensor)


def min_over_ranks(value: int) -> int:
    """Return the smallest of all ranks' values."""
    return -max_over_ranks(-value)


def from_first(value: int) -> int:
    """Return rank 0's value on every rank."""
    tensor = torch.tensor(value)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def bytes_from_first(value: bytes) -> bytes:
    """Return rank 0's bytes on every rank."""
    size = from_first(len(value))
    tensor = torch.zeros(size, dtype=torch.uint8)
    if dist.get_rank() == 0:
        tensor = torch.frombuffer(bytearray(value), dtype=torch.uint8) if size else tensor
    if size:
        dist.broadcast(tensor, src=0)
    return tensor.numpy().tobytes()


def of_all_ranks(text: str) -> list[str]:
    """Return a short text of every rank, in their order, on every rank; cut at `TEXT_BYTES`."""
    mine = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
    rows = [torch.zeros(TEXT_BYTES, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in rows]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return which rows [start, stop) of the whole tensor lie on this rank.

    Raises:
        ValueError: if the tensor is sharded by anything but whole rows over one mesh dimension.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    sharded = [(i, p) for i, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    if any(p.dim != 0 for _, p in sharded) or len(sharded) > 1:
        raise ValueError(f"{tensor.placements} is not a sharding by rows over one dimension.")
    if not sharded:
        return 0, tensor.shape[0]
    mesh_dim = sharded[0][0]
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is outside the mesh of its own tensor"
    rows = -(-tensor.shape[0] // tensor.device_mesh.size(mesh_dim))  # as torch.chunk cuts
    start = min(coordinate[mesh_dim] * rows, tensor.shape[0])
    return start, min(start + rows, tensor.shape[0])
