"""How a recipe is run on a device: what `auto` stands for there. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from mpt.recipe.activations import Precision, Recompute, activation_bytes
from mpt.recipe.attention import Choice, Device, choose
from mpt.recipe.budget import auto_microbatch_size, flops_per_token, state_bytes_per_rank
from mpt.recipe.recipe import Recipe

MEMORY_SHARE = 0.6
"""Of a device's memory that the estimate may fill: it leaves out what allocators and libraries
take on top."""

COMPILE_PAYS_FLOPS = 3e14
"""On CPU, compiling took 30 to 40 s of two cores and gave back 15 to 30 %. A run of this many
FLOPs lasts a quarter of an hour there; a shorter one ends sooner without."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What matters of the device that one rank has."""

    device: Device
    memory_bytes: int
    """All of it, not what happens to be free: a resumed run must choose as it did before, or its
    sums are in another order and its bits differ."""
    has_bf16: bool
    """In hardware."""
    has_compiler: bool
    """One that torch.compile can use."""
    flash_installed: bool = False


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What every `auto` came to."""

    precision: Precision
    attention: Choice
    recompute: Recompute
    microbatch_size: int
    compile: bool

    def to_json(self) -> dict[str, object]:
        """Return it for the event log."""
        return {
            "precision": self.precision,
            "attention": self.attention.backend,
            "recompute": self.recompute,
            "microbatch_size": self.microbatch_size,
            "compile": self.compile,
        }


def fit(recipe: Recipe, machine: Machine, world_size: int) -> Fit:
    """Return how `recipe` is run by `world_size` ranks with such a machine each.

    The update depends on none of it beyond rounding, so a run may go on on other hardware.

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
    share = -(-train.global_batch_size // world_size)
    state = state_bytes_per_rank(model, world_size)
    budget = int(MEMORY_SHARE * machine.memory_bytes) - state
    least = 1 if train.microbatch_size == "auto" else min(train.microbatch_size, share)
    kinds: tuple[Recompute, ...] = get_args(Recompute)
    if train.activation_checkpointing != "auto":
        kinds = (train.activation_checkpointing,)
    fitting = (
        how
        for how in kinds
        if activation_bytes(model, least, precision, attention.backend, how) <= budget
    )
    recompute = next(fitting, kinds[-1])  # if nothing fits, that is for the device to say
    return Fit(
        precision=precision,
        attention=attention,
        recompute=recompute,
        microbatch_size=least
        if train.microbatch_size != "auto"
        else auto_microbatch_size(
            model,
            share=share,
            budget_bytes=budget,
            precision=precision,
            attention=attention.backend,
            recompute=recompute,
        ),
        compile=_should_compile(recipe, machine),
    )


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
