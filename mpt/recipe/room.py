"""The memory of a rank, and which switches of a recipe it has room for. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mpt.errors import UsageError
from mpt.recipe.activations import Attention, Precision, Recompute, activation_bytes
from mpt.recipe.budget import (
    auto_microbatch_size,
    kept_gathered_bytes,
    state_bytes_per_rank,
    whole_gradient_bytes,
)
from mpt.recipe.machine import Machine
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe

MEMORY_SHARE = 0.6
"""Of a device's memory that the estimate may fill: it leaves out what allocators and libraries
take on top."""

GradientReduction = Literal["once", "each"]
"""once: whole gradients are summed up over the microbatches of a step, and reduced over ranks with
the last; each: reduced with every microbatch, so that a rank keeps its own shard alone."""


def share_of(recipe: Recipe, world_size: int) -> int:
    """Return the samples of a step that a rank takes at most."""
    return -(-recipe.train.global_batch_size // world_size)


@dataclass(frozen=True)
class Room:
    """The memory of a rank, and what a recipe's switches take of it."""

    recipe: Recipe
    machine: Machine
    world_size: int
    precision: Precision
    attention: Attention

    def replicas(self) -> tuple[int, str]:
        """Return the copies of the model, and why so many."""
        wanted, n_local = self.recipe.train.replicas, self.machine.ranks_per_node
        if wanted != "auto":
            if self.world_size % wanted:
                what = f"{wanted} does not divide the {self.world_size} workers."
                raise UsageError(str(Problem("train.replicas", what, "use 1, or auto.")))
            return wanted, "as train.replicas says" if wanted > 1 else "plain FSDP"
        n_nodes, rest = divmod(self.world_size, n_local)
        if self.machine.device == "cpu":
            return 1, "a CPU has no faster way within a node than between nodes"
        if n_nodes == 1 or n_local == 1 or rest:
            return 1, "nodes with several workers each, and equally many, would be needed for more"
        how = next(self._recomputes(1))
        if self._left(n_nodes, how, self._least) < 0:
            return 1, "the GPUs of a node alone are too small for the state"
        return n_nodes, f"one a node: its {n_local} GPUs hold the state, and are near each other"

    def recompute(self, replicas: int) -> tuple[Recompute, str]:
        """Return how much blocks make again, and why."""
        if self.recipe.train.activation_checkpointing != "auto":
            wanted = self.recipe.train.activation_checkpointing
            return wanted, "as train.activation_checkpointing says"
        how = next(self._recomputes(replicas))
        if self._left(replicas, how, self._least) < 0:
            return how, "by the estimate not even so does a sample fit; the device will say"
        return how, f"the least with which a microbatch of {self._least} fits"

    def reshard_and_size(self, replicas: int, recompute: Recompute) -> tuple[bool, int, str]:
        """Return whether blocks give gathered weights back, and the size of a microbatch."""
        train = self.recipe.train
        whole = kept_gathered_bytes(self.recipe.model, self.precision)
        if train.reshard_after_forward != "auto":
            kept = 0 if train.reshard_after_forward else whole
            size = self._size(replicas, recompute, kept)
            return train.reshard_after_forward, size, "as train.reshard_after_forward says"
        alone = self.world_size == replicas
        if alone and self._left(replicas, recompute, self._least) >= whole:
            # Nothing is communicated; but each gathering casts all weights once more.
            size = self._size(replicas, recompute, whole)
            return False, size, "no other rank has part of the weights, and they fit"
        size = self._size(replicas, recompute, 0)
        if self._left(replicas, recompute, size) >= whole:
            return False, size, "all gathered weights fit beside the rest"
        return True, size, "all gathered weights do not fit beside the rest"

    def reduction(
        self, replicas: int, recompute: Recompute, reshard: bool, size: int
    ) -> tuple[GradientReduction, str]:
        """Return when gradients are reduced, and why."""
        share = share_of(self.recipe, self.world_size)
        if size >= share:
            return "once", "a step has one microbatch"
        n_shards = self.world_size // replicas
        whole = whole_gradient_bytes(self.recipe.model, n_shards)
        left = self._left(replicas, recompute, size)
        if not reshard:
            left -= kept_gathered_bytes(self.recipe.model, self.precision)
        if whole <= max(left, 0):
            return "once", "whole gradients fit beside the rest"
        return "each", "whole gradients do not fit beside the rest"

    @property
    def _least(self) -> int:
        """Samples in the smallest microbatch that the recipe allows."""
        size = self.recipe.train.microbatch_size
        return 1 if size == "auto" else min(size, share_of(self.recipe, self.world_size))

    def _recomputes(self, replicas: int) -> Iterator[Recompute]:
        """Yield what may be made again, the least with which a sample fits first."""
        wanted = self.recipe.train.activation_checkpointing
        kinds: tuple[Recompute, ...] = get_args(Recompute) if wanted == "auto" else (wanted,)
        yield from (how for how in kinds if self._left(replicas, how, self._least) >= 0)
        yield kinds[-1]  # if nothing fits, that is for the device to say

    def _left(self, replicas: int, recompute: Recompute, size: int) -> int:
        """Bytes that microbatches of such a size leave."""
        model = self.recipe.model
        state = state_bytes_per_rank(model, self.world_size // replicas, self.recipe.optimizer.name)
        taken = activation_bytes(model, size, self.precision, self.attention, recompute)
        return int(MEMORY_SHARE * self.machine.memory_bytes) - state - taken

    def _size(self, replicas: int, recompute: Recompute, kept: int) -> int:
        """The size of a microbatch where `kept` bytes are spoken for besides."""
        model = self.recipe.model
        if self.recipe.train.microbatch_size != "auto":
            return self._least
        state = state_bytes_per_rank(model, self.world_size // replicas, self.recipe.optimizer.name)
        return auto_microbatch_size(
            model,
            share=share_of(self.recipe, self.world_size),
            budget_bytes=int(MEMORY_SHARE * self.machine.memory_bytes) - state - kept,
            precision=self.precision,
            attention=self.attention,
            recompute=recompute,
        )
