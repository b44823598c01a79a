"""Rows of matrices to the rank that owns each matrix whole, and back: two collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mpt.dist import local_tensor


@dataclass(frozen=True)
class Exchange:
    """Who holds which rows of some matrices of one shape, and who owns which of them.

    Matrices are dealt out one by one, so that work on whole matrices is divided among ranks, and
    no rank has more of them in memory than it has rows: about a world_size-th.
    """

    shape: tuple[int, int]
    rows: tuple[int, ...]
    """Held by each rank, as `torch.chunk` cuts."""
    owned: tuple[tuple[int, ...], ...]
    """By each rank: numbers of matrices."""
    rank: int
    group: dist.ProcessGroup | None
    """None: parameters are not sharded."""

    @classmethod
    def of(cls, parameters: Sequence[Tensor], first: int) -> Exchange:
        """Return the exchange for parameters of one shape and sharding.

        Args:
            first: matrices that were dealt out before: the next rank is the next one's owner.
        """
        parameter = parameters[0]
        n, m = parameter.shape
        mesh_dim = _sharded_over(parameter)
        if mesh_dim is None:
            return cls((n, m), (n,), (tuple(range(len(parameters))),), 0, None)
        assert isinstance(parameter, DTensor)
        group = parameter.device_mesh.get_group(mesh_dim)
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        chunk = -(-n // world_size)
        rows = tuple(min(max(n - r * chunk, 0), chunk) for r in range(world_size))
        assert local_tensor(parameter).shape[0] == rows[rank], "rows are not as torch.chunk cuts"
        owned = tuple(
            tuple(i for i in range(len(parameters)) if (first + i) % world_size == r)
            for r in range(world_size)
        )
        return cls((n, m), rows, owned, rank, group)

    def to_owners(self, held: Sequence[Tensor]) -> Tensor:
        """Return the matrices that this rank owns, whole: (mine, n, m).

        Args:
            held: this rank's rows of every matrix.
        """
        if self.group is None:
            return torch.stack(list(held))
        columns, mine = self.shape[1], len(self.owned[self.rank])
        sent = torch.cat([held[i].flatten() for owned in self.owned for i in owned])
        counts = [len(owned) * self.rows[self.rank] * columns for owned in self.owned]
        wanted = [mine * rows * columns for rows in self.rows]
        got = self._swap(sent, counts, wanted)
        parts = [
            part.view(mine, rows, columns)
            for part, rows in zip(got.split(wanted), self.rows, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def to_holders(self, whole: Tensor) -> list[Tensor]:
        """Return this rank's rows of every matrix; `whole` (mine, n, m) are those it owns."""
        if self.group is None:
            return list(whole.unbind())
        columns, mine, rows = self.shape[1], len(self.owned[self.rank]), self.rows[self.rank]
        sent = torch.cat([part.flatten() for part in whole.split(self.rows, dim=1)])
        counts = [mine * theirs * columns for theirs in self.rows]
        wanted = [len(owned) * rows * columns for owned in self.owned]
        got = self._swap(sent, counts, wanted)
        held: dict[int, Tensor] = {}
        for owned, part in zip(self.owned, got.split(wanted), strict=True):
            held |= zip(owned, part.view(len(owned), rows, columns), strict=True)
        return [held[i] for i in range(len(held))]

    def _swap(self, sent: Tensor, counts: list[int], wanted: list[int]) -> Tensor:
        got = sent.new_empty(sum(wanted))
        dist.all_to_all_single(got, sent, wanted, counts, group=self.group)
        return got


def _sharded_over(parameter: Tensor) -> int | None:
    """Return the dimension of the mesh that rows are spread over, if they are."""
    if not isinstance(parameter, DTensor):
        return None
    found = [i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    return found[0] if found else None
