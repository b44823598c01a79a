"""The `train:`, `optimizer:`, `schedule:`, `eval:`, `checkpoint:` and `health:` sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mpt.recipe.problem import Problem

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class SeqWarmup:
    """Samples cut into shorter ones at first: the same tokens in the same order, and cheaper."""

    start: int
    """Tokens of a sample at first; they double until they are `model.max_seq_len`."""
    steps: int
    """Steps before samples are whole; each length has an equal part of them."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        for key in ("start", "steps"):
            if getattr(self, key) < 1:
                yield Problem(
                    f"train.seq_warmup.{key}", f"{getattr(self, key)} is not a positive count."
                )

    def length(self, step: int, longest: int) -> int:
        """Return the tokens of a sample in step `step`, counted from 0."""
        n_lengths = (longest // self.start).bit_length() - 1  # below the longest
        if step >= self.steps or n_lengths < 1:
            return longest
        return self.start << (step * n_lengths // self.steps)


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int
    """Optimizer steps to run."""
    global_batch_size: int
    """Samples per optimizer step, summed over ranks."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Samples per rank per forward pass; changes memory and speed, never the update."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype; auto is bf16 where the device has it in hardware. Weights stay fp32."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; `.inf` turns clipping off."""
    z_loss: float = 0.0
    """Added to the loss of a token: this times the square of its log-partition, which keeps
    logits from drifting (1e-4 is usual). The loss that is reported is without it."""
    seq_warmup: SeqWarmup | None = None
    """Cut samples into shorter ones at first: less attention to compute while there is little to
    attend to. Exact with ALiBi, which knows distances alone."""
    init_from: str | None = None
    """A checkpoint, a run or an import whose weights a new run begins with."""
    attention: Literal["auto", "sdpa", "blocks", "wide", "flex", "flash"] = "auto"
    """How attention is computed; changes memory and speed, never what is computed."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What blocks make again in the backward pass instead of keeping it: selective all but what
    matrix products give, full everything; auto takes the least with which a sample fits."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each block with torch.compile; auto does so when the run is long enough to gain."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Give back a block's gathered weights after its forward pass, and gather them again for the
    backward one (torch's `fully_shard` has the same word); auto keeps them where they fit."""
    replicas: int | Literal["auto"] = 1
    """Copies of the model, each sharded over world_size / replicas workers (HSDP); 1 is plain
    FSDP; auto has one a node, on GPUs where a node can hold the state."""
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Matrix products of blocks in 8 bits, scaled by tensor or by row, with torchao on a GPU; it
    changes what is computed, so nothing chooses it by itself."""
    log_every_steps: int = 10
    """Print a line every so many steps when there is no terminal to draw on."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        counts = ("steps", "global_batch_size", "microbatch_size", "replicas", "log_every_steps")
        for key in counts:
            value = getattr(self, key)
            if value != "auto" and value < 1:
                yield Problem(f"train.{key}", f"{value} is not a positive count.")
        if not self.max_grad_norm > 0.0:
            yield Problem(
                "train.max_grad_norm", f"{self.max_grad_norm} is not positive.", ".inf is off."
            )
        if not 0.0 <= self.z_loss < float("inf"):
            yield Problem("train.z_loss", f"{self.z_loss} is negative or infinite.", "0 is off.")
        if self.seq_warmup is not None:
            yield from self.seq_warmup.problems()

    @property
    def warming(self) -> int:
        """Steps in which samples may be cut."""
        return 0 if self.seq_warmup is None else min(self.seq_warmup.steps, self.steps)

    def sequence_length(self, step: int, longest: int) -> int:
        """Return the tokens of a sample in step `step`, counted from 0, where whole ones have
        `longest`."""
        return longest if self.seq_warmup is None else self.seq_warmup.length(step, longest)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: OptimizerName = "adamw"
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the matrices within
    blocks and AdamW for the rest; one-dimensional tensors are not decayed."""
    lr: float
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, per step times the learning rate."""
    momentum: float = 0.95
    """muon only: decay of the momentum per step."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if not 0.0 < self.lr < float("inf"):
            yield Problem("optimizer.lr", f"{self.lr} is not a positive number.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            yield Problem("optimizer.betas", f"{list(self.betas)} are not both in [0, 1).")
        for key in ("eps", "weight_decay"):
            if not 0.0 <= getattr(self, key) < float("inf"):
                yield Problem(f"optimizer.{key}", f"{getattr(self, key)} is negative or infinite.")
        if not 0.0 <= self.momentum < 1.0:
            yield Problem("optimizer.momentum", f"{self.momentum} is not in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from near zero to its peak."""
    final: float = 0.1
    """Learning rate at the last step, as a fraction of the peak; constant ignores it."""
    decay_steps: int | None = None
    """wsd only: steps of the final decay; null means a fifth of the run."""

    def problems(self, steps: int) -> Iterator[Problem]:
        """Yield what is wrong with this section in a run of `steps`."""
        if not 0 <= self.warmup_steps < max(steps, 1):
            yield Problem(
                "schedule.warmup_steps",
                f"{self.warmup_steps} warm-up steps do not fit in a run of {steps}.",
                f"use 0 to {max(steps, 1) - 1}.",
            )
        if not 0.0 <= self.final <= 1.0:
            yield Problem("schedule.final", f"{self.final} is not a fraction in [0, 1].")
        if self.decay_steps is not None and self.name != "wsd":
            yield Problem("schedule.decay_steps", f"has no meaning for {self.name}; drop it.")
        elif self.decay_steps is not None and not (
            0 < self.decay_steps <= steps - self.warmup_steps
        ):
            yield Problem(
                "schedule.decay_steps",
                f"{self.decay_steps} does not fit in {steps} steps "
                f"after {self.warmup_steps} of warm-up.",
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every_steps: int = 1000
    """Evaluate on `data.eval` every so many steps, and after the last."""
    samples: int | None = None
    """Samples to evaluate on, from the start of `data.eval`; null means all."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        for key in ("every_steps", "samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield Problem(f"eval.{key}", f"{value} is not a positive count.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int = 1000
    """Save every so many steps, and after the last."""
    keep: int = 3
    """Newest checkpoints to keep; with 1 there is none to fall back to if it is damaged."""
    memory_every_steps: int | Literal["auto", "off"] = "auto"
    """Copy the state to host memory that outlives a worker, every so many steps; auto takes as
    many as keep the cost under 2 % of a step."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self.every_steps < 1:
            yield Problem("checkpoint.every_steps", f"{self.every_steps} is not a positive count.")
        if self.keep < 1:
            yield Problem("checkpoint.keep", f"{self.keep} is not a positive count.")
        every = self.memory_every_steps
        if not isinstance(every, str) and every < 1:
            yield Problem("checkpoint.memory_every_steps", f"{every} is not a positive count.")


@dataclass(frozen=True, kw_only=True)
class Health:
    """When an update is skipped, and when the run goes back to an earlier checkpoint."""

    spike_sigmas: float = 6.0
    """Skip an update whose loss is this many standard deviations above the mean of the window;
    `.inf` turns it off. Loss or gradient that is not finite is skipped always."""
    spike_window: int = 128
    """Steps that mean and deviation are taken over; no loss counts as a spike before it is full."""
    max_skipped_in_a_row: int = 5
    """Skipped updates in a row after which the run rolls back to the last good checkpoint and
    passes over the data that it skipped on."""
    max_rollbacks: int = 3
    """Rollbacks before the run ends as diverged."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if not self.spike_sigmas > 0.0:
            yield Problem("health.spike_sigmas", f"{self.spike_sigmas} is not positive.")
        if self.spike_window < 2:
            yield Problem("health.spike_window", f"{self.spike_window} is less than 2.")
        if self.max_skipped_in_a_row < 1:
            yield Problem(
                "health.max_skipped_in_a_row", f"{self.max_skipped_in_a_row} is not positive."
            )
        if self.max_rollbacks < 0:
            yield Problem("health.max_rollbacks", f"{self.max_rollbacks} is negative.")
