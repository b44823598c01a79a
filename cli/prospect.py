"""What a recipe would come to on one kind of device, in the words of a table. No logic."""

from __future__ import annotations

import dataclasses

from mpt.recipe.budget import Plan
from mpt.recipe.fit import Fit
from mpt.recipe.machine import Machine

from .render import GIB, counted


@dataclasses.dataclass(frozen=True)
class Prospect:
    """What a recipe would need on one kind of device."""

    machine: Machine
    fit: Fit
    by: str
    """What says which size a microbatch has: memory, a probe or the estimate."""
    plans: list[Plan]
    """With no activation checkpointing, a selective and a full one."""

    @property
    def where(self) -> str:
        """How the device is called in a sentence."""
        return f"on {self.machine.name}" if self.machine.device == "cuda" else "on this CPU"

    @property
    def activations(self) -> str:
        """What a microbatch keeps, by how much is made again."""
        sizes = [f"{plan.activation_bytes / GIB:.2f}" for plan in self.plans]
        if len(set(sizes)) == 1:
            return f"{sizes[0]} GiB {self.where}"
        return (
            f"{sizes[0]} GiB {self.where} ({sizes[1]} with selective, {sizes[2]} with full "
            "activation checkpointing)"
        )

    def to_json(self) -> dict[str, object]:
        """Return what was chosen, for what and why."""
        on = self.machine.to_json()
        return {"on": on, "by": self.by, "chosen": self.fit.to_json(), "why": self.choices}

    @property
    def choices(self) -> dict[str, str]:
        """What every `auto` comes to, and why, by the rows of a table."""
        fit, why = self.fit, self.fit.why
        samples = counted(fit.microbatch_size, "sample")
        size = {
            "recipe": f"{samples}, as train.microbatch_size says",
            "memory": f"{samples}, as the run has it in chosen.json",
            "probe": f"{samples} by the estimate; sizes are timed before the first step",
        }.get(self.by, f"{samples}, as large as memory allows")
        gathered = "given back" if fit.reshard_after_forward else "kept"
        sharding = f"weights {gathered} after forward: {why['reshard_after_forward']}"
        sharding += f"; gradients reduced {_REDUCED[fit.reduce_gradients]}"
        if why["reduce_gradients"] != "a step has one microbatch":
            sharding += f": {why['reduce_gradients']}"
        precision = fit.precision if fit.float8 == "off" else f"float8, {fit.float8}"
        return {
            "precision": precision,
            "attention": str(fit.attention),
            "recompute": f"{fit.recompute}: {why['recompute']}",
            "microbatch": size,
            "sharding": sharding,
            "copies": f"{fit.replicas}: {why['replicas']}",
            "compile": "blocks" if fit.compile else "no",
        }


_REDUCED = {"once": "once a step", "each": "with each microbatch"}
