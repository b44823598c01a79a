"""How a recipe is run on a device: what `auto` stands for there. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpt.errors import UsageError
from mpt.recipe.activations import Precision, Recompute
from mpt.recipe.attention import Choice, choose
from mpt.recipe.budget import flops_per_token, kept_gathered_bytes, whole_gradient_bytes
from mpt.recipe.float8 import Float8, float8_obstacle
from mpt.recipe.machine import Machine
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe
from mpt.recipe.room import MEMORY_SHARE, GradientReduction, Room, share_of

__all__ = ["COMPILE_PAYS_FLOPS", "MEMORY_SHARE", "Fit", "Machine", "at_size", "beside_bytes", "fit"]

COMPILE_PAYS_FLOPS = 3e14
"""On CPU, compiling took 30 to 40 s of two cores and gave back 15 to 30 %. A run of this many
FLOPs lasts a quarter of an hour there; a shorter one ends sooner without."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What every `auto` came to."""

    precision: Precision
    attention: Choice
    recompute: Recompute
    microbatch_size: int
    compile: bool
    replicas: int
    """Copies of the model, each sharded over the other ranks."""
    reshard_after_forward: bool
    reduce_gradients: GradientReduction
    float8: Float8
    why: Mapping[str, str] = field(default_factory=dict, compare=False)
    """A phrase for what was left to us and needs one, by the names of `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """Return it for events, checkpoints and `chosen.json`."""
        return {
            "precision": self.precision,
            "attention": self.attention.backend,
            "recompute": self.recompute,
            "microbatch_size": self.microbatch_size,
            "compile": self.compile,
            "replicas": self.replicas,
            "reshard_after_forward": self.reshard_after_forward,
            "reduce_gradients": self.reduce_gradients,
            "float8": self.float8,
        }


def fit(recipe: Recipe, machine: Machine, world_size: int) -> Fit:
    """Return how `recipe` is run by `world_size` ranks with such a machine each.

    The update depends on none of it beyond rounding, float8 aside, so a run may go on on other
    hardware.

    Raises:
        UsageError: what the recipe wants by name cannot be had there.
    """
    model, train = recipe.model, recipe.train
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if machine.has_bf16 else "fp32"
    attention = choose(
        train.attention,
        model,
        machine.device,
        flash_installed=machine.flash_installed,
        precision=precision,
    )
    if obstacle := float8_obstacle(train.float8, model, machine, precision):
        raise UsageError(str(Problem("train.float8", f"{train.float8} {obstacle}", "use `off`.")))
    room = Room(recipe, machine, world_size, precision, attention.backend)
    replicas, why_replicas = room.replicas()
    recompute, why_recompute = room.recompute(replicas)
    reshard, size, why_reshard = room.reshard_and_size(replicas, recompute)
    chosen = Fit(
        precision=precision,
        attention=attention,
        recompute=recompute,
        microbatch_size=size,
        compile=_should_compile(recipe, machine),
        replicas=replicas,
        reshard_after_forward=reshard,
        reduce_gradients="once",
        float8=train.float8,
        why={
            "attention": attention.why,
            "recompute": why_recompute,
            "replicas": why_replicas,
            "reshard_after_forward": why_reshard,
        },
    )
    return at_size(chosen, recipe, machine, world_size, size)


def at_size(chosen: Fit, recipe: Recipe, machine: Machine, world_size: int, size: int) -> Fit:
    """Return the same choice with microbatches of another size, and what follows from it."""
    room = Room(recipe, machine, world_size, chosen.precision, chosen.attention.backend)
    reduction, why = room.reduction(
        chosen.replicas, chosen.recompute, chosen.reshard_after_forward, size
    )
    return replace(
        chosen,
        microbatch_size=size,
        reduce_gradients=reduction,
        why={**chosen.why, "reduce_gradients": why},
    )


def beside_bytes(chosen: Fit, recipe: Recipe, world_size: int) -> int:
    """Return what a rank keeps beside state and activations: gathered weights, whole gradients."""
    kept = 0
    if not chosen.reshard_after_forward:
        kept += kept_gathered_bytes(recipe.model, chosen.precision)
    if chosen.reduce_gradients == "once" and chosen.microbatch_size < share_of(recipe, world_size):
        kept += whole_gradient_bytes(recipe.model, world_size // chosen.replicas)
    return kept


def _should_compile(recipe: Recipe, machine: Machine) -> bool:
    """Whether to compile blocks; auto weighs what it costs against the run's length."""
    train = recipe.train
    if train.compile != "auto":
        return train.compile
    if machine.device == "cuda":
        return True
    tokens = train.steps * train.global_batch_size * recipe.model.max_seq_len
    long_enough = tokens * flops_per_token(recipe.model) >= COMPILE_PAYS_FLOPS
    return long_enough and machine.has_compiler
