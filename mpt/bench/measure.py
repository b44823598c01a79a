"""One rank's measurement: the real training step of a recipe, timed part by part."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpt.data.loader import Loader
from mpt.data.order import rank_slice
from mpt.dist import Ranks, with_replicas
from mpt.objective import next_token_loss
from mpt.optim import set_learning_rate, training_tensors
from mpt.peak import peak_flops
from mpt.recipe import Recipe
from mpt.recipe.budget import causal_flops_per_token, flops_per_token
from mpt.recipe.fit import Fit, fit
from mpt.recipe.probing import probe_pays
from mpt.rundir import versions
from mpt.schedule import learning_rate
from mpt.state import Loss, Microbatch
from mpt.tokenizer import load_tokenizer
from mpt.train.build import DTYPES, build, machine_of
from mpt.train.pace import DeviceClock, HostClock
from mpt.train.probe import probe
from mpt.train.step import train_step

PARTS = ("data", "forward", "backward", "optimizer")
"""backward includes the reduction and clipping of gradients; what is left of a step is zeroing
gradients and the like."""


@dataclass(frozen=True)
class Lap:
    """The seconds of one step, in all and by part."""

    whole: float
    parts: dict[str, float]
    loss: Tensor
    """() fp32, on the device."""


def measure(recipe: Recipe, ranks: Ranks, *, steps: int, warmup: int, real: bool) -> dict[str, Any]:
    """Take `warmup` steps and then `steps` that count, as training takes them; return the figures.

    Args:
        real: read the recipe's data; else random tokens of the same shape.
    """
    with Course.prepared(recipe, ranks, real=real) as course:
        began = time.perf_counter()
        early = course.take(1)
        first_step_s = time.perf_counter() - began
        early += course.take(warmup - 1)
        forget_peak(ranks.device)
        laps = course.take(steps)
    return {
        **_figures(recipe, course.chosen, ranks, laps),
        "first_step_s": first_step_s,
        "warmup_steps": warmup,
        "losses": [float(lap.loss) for lap in early + laps],
        "data": "the recipe's" if real else "random tokens",
        "chosen": course.chosen.to_json(),
        "hardware": _hardware(ranks),
        "versions": versions(),
    }


class Course:
    """A recipe's model, optimizer and data, ready to take the steps that training takes."""

    def __init__(
        self,
        recipe: Recipe,
        chosen: Fit,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: _Source,
        stopwatch: Stopwatch,
    ) -> None:
        self.chosen = chosen
        self._recipe, self._source, self._stopwatch = recipe, source, stopwatch
        self._model, self._optimizer = model, optimizer
        self._steps = 0

    @classmethod
    @contextmanager
    def prepared(cls, recipe: Recipe, ranks: Ranks, *, real: bool) -> Iterator[Course]:
        """Build what training would build here; `real` as for `measure`."""
        machine = machine_of(ranks)
        chosen = fit(recipe, machine, ranks.world_size)
        ranks = with_replicas(ranks, chosen.replicas)
        model, optimizer = build(recipe, chosen, ranks)
        if probe_pays(recipe, machine, chosen, ranks.world_size):
            chosen, _ = probe(model, recipe, machine, chosen, ranks, beat=lambda: None)
        stopwatch = Stopwatch(ranks.device, optimizer)
        with closing(_Source(recipe, chosen, ranks, real)) as source:
            yield cls(recipe, chosen, model, optimizer, source, stopwatch)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint of it would hold."""
        return training_tensors(self._model, self._optimizer)

    def take(self, steps: int) -> list[Lap]:
        """Take the next so many steps."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> Lap:
        recipe, step = self._recipe, self._steps
        self._steps += 1
        self._stopwatch.mark("data")
        microbatches = self._source.next(step)
        self._stopwatch.mark("rest")
        total = recipe.train.steps
        rate = learning_rate(recipe.schedule, recipe.optimizer.lr, min(step, total - 1), total)
        set_learning_rate(self._optimizer, rate)
        taken = train_step(
            self._model,
            self._optimizer,
            microbatches,
            self._stopwatch.objective,
            max_grad_norm=recipe.train.max_grad_norm,
            reduce_each=self.chosen.reduce_gradients == "each",
        )
        return self._stopwatch.lap(taken.loss)


class Stopwatch:
    """Marks where parts of a step begin and end, and reads them when the step is over."""

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
        self._device = device
        self._clock: Any = DeviceClock() if device.type == "cuda" else HostClock()
        self._marks: list[tuple[str, Any]] = []
        optimizer.register_step_pre_hook(lambda *_: self.mark("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.mark("rest"))

    def mark(self, part: str) -> None:
        """From here on it is `part`."""
        self._marks.append((part, self._clock.mark()))

    def objective(self, model: nn.Module, microbatch: Microbatch) -> Loss:
        """What is minimised; after it comes the backward pass."""
        self.mark("forward")
        loss = next_token_loss(model, microbatch)
        self.mark("backward")
        return loss

    def lap(self, loss: Tensor) -> Lap:
        """Return the seconds since the first mark; waits for the device, and begins anew."""
        self.mark("end")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        marks, self._marks = self._marks, []
        parts = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in pairwise(marks):
            if part in parts:
                parts[part] += self._clock.seconds(start, end)
        return Lap(self._clock.seconds(marks[0][1], marks[-1][1]), parts, loss)


class _Source:
    """This rank's microbatches of each step."""

    def __init__(self, recipe: Recipe, chosen: Fit, ranks: Ranks, real: bool) -> None:
        self._samples = recipe.train.global_batch_size
        self._loader = _loader(recipe, chosen, ranks) if real else None
        self._random = _random_batch(recipe, chosen, ranks)

    def next(self, step: int) -> list[Microbatch]:
        return self._random if self._loader is None else self._loader.next(step * self._samples)

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()


def _loader(recipe: Recipe, chosen: Fit, ranks: Ranks) -> Loader:
    apart = recipe.model.attn_uses_sequence_id
    return Loader(
        recipe.data,
        recipe.model,
        seed=recipe.seed,
        global_batch_size=recipe.train.global_batch_size,
        microbatch_size=chosen.microbatch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        node_ranks=ranks.of_node,
        device=ranks.device,
        eod_id=load_tokenizer(Path(recipe.tokenizer.path)).eod_id if apart else None,
    )


def _random_batch(recipe: Recipe, chosen: Fit, ranks: Ranks) -> list[Microbatch]:
    """Return tokens drawn evenly from the vocabulary, in the shapes that the loader gives."""
    share = rank_slice(recipe.train.global_batch_size, ranks.rank, ranks.world_size)
    largest = -(-recipe.train.global_batch_size // ranks.world_size)
    size, length = chosen.microbatch_size, recipe.model.max_seq_len
    generator = torch.Generator().manual_seed(share.start)
    microbatches = []
    for _ in range(-(-largest // size)):
        tokens = torch.randint(0, recipe.model.vocab_size, (size, length), generator=generator)
        documents = torch.zeros_like(tokens) if recipe.model.attn_uses_sequence_id else None
        microbatches.append(
            Microbatch(
                tokens.to(ranks.device),
                tokens.roll(-1, dims=1).to(ranks.device),
                None if documents is None else documents.to(ranks.device),
            )
        )
    return microbatches


def _figures(recipe: Recipe, chosen: Fit, ranks: Ranks, laps: Sequence[Lap]) -> dict[str, Any]:
    seconds = [lap.whole for lap in laps]
    median = statistics.median(seconds)
    tokens = recipe.train.global_batch_size * recipe.model.max_seq_len
    peak = peak_flops(ranks.device, DTYPES[chosen.precision])
    per_flop = None if peak is None else tokens / median / (peak * ranks.world_size)
    return {
        "world_size": ranks.world_size,
        "steps": len(laps),
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / median,
        "tokens_per_second_per_rank": tokens / median / ranks.world_size,
        "step_s": {"median": median, "p95": _percentile(seconds, 0.95), "least": min(seconds)},
        "parts_s": {part: statistics.median(lap.parts[part] for lap in laps) for part in PARTS},
        "mfu": None if per_flop is None else per_flop * flops_per_token(recipe.model),
        "causal_mfu": None if per_flop is None else per_flop * causal_flops_per_token(recipe.model),
        "peak_flops_per_rank": peak,
        "peak_memory_bytes": peak_memory(ranks.device),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    """The least value that this share of all values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def forget_peak(device: torch.device) -> None:
    """Have `peak_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without it the peak is that of start and warm-up as well
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors took on a GPU at most; on a CPU, the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _hardware(ranks: Ranks) -> dict[str, Any]:
    if ranks.device.type == "cuda":
        found = torch.cuda.get_device_properties(ranks.device)
        return {"device": found.name, "memory_bytes": found.total_memory}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    return {
        "device": about.get("model name", "unknown"),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "clock_mhz": float(about["cpu MHz"]) if "cpu MHz" in about else None,
    }
