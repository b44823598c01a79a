"""States to save, and the calls that save and load them on the ranks of a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mpt.checkpoint.load import restore
from mpt.checkpoint.memory import Every, Memory
from mpt.checkpoint.save import Origin, Saver
from mpt.dist import Ranks
from mpt.optim import build_optimizer, training_tensors
from mpt.recipe.model import Model
from mpt.recipe.train import Optimizer
from mpt.state import RunState, Streak, Vitals
from tests.tiny_model import TINY, digest, sharded, whole

STEPS = (1, 2, 3)

Files = list[str]
"""Where each rank finds the memory that the test holds for it, as a supervisor does."""

Saved = tuple[Path, dict[int, str]]
"""A run directory, and the digest of the state of each step."""


ADAMW = Optimizer(lr=0.1)


def scrambled(
    ranks: Ranks, step: int, cfg: Model = TINY, optimizer_cfg: Optimizer = ADAMW
) -> dict[str, Tensor]:
    """Return the tensors of a training state that is a function of `step` alone."""
    model = sharded(ranks, cfg, seed=step)
    optimizer = build_optimizer(model, optimizer_cfg)
    tensors = training_tensors(model, optimizer)
    for name, tensor in tensors.items():
        if name.startswith("optimizer.step."):
            tensor.fill_(step)
        elif name.startswith("optimizer."):
            tensor.copy_(tensors[name.split(".", 2)[2]] * 0.5)
    return tensors


LEAN = {
    "weight": (5, 3),
    "gain": (1,),
    "optimizer.exp_avg.weight": (5, 3),
    "optimizer.exp_avg.gain": (1,),
}


def lean(ranks: Ranks, step: int) -> dict[str, Tensor]:
    """Return the fewest tensors that save and load as a training state does, quickly made."""
    tensors: dict[str, Tensor] = {"optimizer.step.weight": torch.tensor(float(step))}
    rows = [*[Replicate()] * (ranks.mesh.ndim - 1), Shard(0)]
    for salt, (name, shape) in enumerate(LEAN.items()):
        generator = torch.Generator().manual_seed(100 * step + salt)
        tensor = torch.randn(shape, generator=generator)
        tensors[name] = distribute_tensor(tensor, ranks.mesh, rows, src_data_rank=None)
    return tensors


def digest_whole(tensors: dict[str, Tensor]) -> str:
    return digest({name: whole(tensor) for name, tensor in tensors.items()})


def state_at(step: int) -> RunState:
    """Return the state that goes with the tensors of `step`."""
    vitals = Vitals(((step, 1 / (2 + step)),), Streak())
    return RunState(step, step * 10, step * 160, vitals)


def saver_in(
    root: Path,
    tensors: Mapping[str, Tensor],
    ranks: Ranks,
    report: Callable[..., None],
    *,
    keep: int = 3,
    attempt: int = 0,
    newer: Callable[[], int | None] = lambda: None,
    versions: Any = None,
) -> Saver:
    """Return a saver of a run in `root`, where a tokenizer lies."""
    return Saver(
        root / "checkpoints",
        tensors,
        Origin(TINY, "recipe-hash", root / "tokenizer.model", versions or {}),
        ranks,
        keep=keep,
        report=report,
        attempt=attempt,
        newer=newer,
    )


def save_all(
    ranks: Ranks,
    root: Path,
    steps: tuple[int, ...],
    keep: int = 3,
    optimizer: Optimizer = ADAMW,
) -> list[Any]:
    """Save states of several steps through one saver; return the digest of each and reports."""
    tensors = scrambled(ranks, steps[0], TINY, optimizer)
    reports: list[tuple[str, dict[str, Any]]] = []
    saver = saver_in(
        root,
        tensors,
        ranks,
        lambda kind, **fields: reports.append((kind, fields)),
        keep=keep,
        versions={"torch": torch.__version__},
    )
    digests = {}
    for step in steps:
        for name, tensor in scrambled(ranks, step, TINY, optimizer).items():
            tensors[name].copy_(tensor)
        digests[step] = digest_whole(tensors)
        saver.save(state_at(step))
        for tensor in tensors.values():
            tensor.zero_()  # training goes on at once: the snapshot must not see it
    saver.close()
    return [digests, reports]


def load_newest(
    ranks: Ranks, root: Path, cfg: Model = TINY, optimizer: Optimizer = ADAMW
) -> tuple[Any, str, list[str]]:
    tensors = scrambled(ranks, 99, cfg, optimizer)
    rejected: list[str] = []
    state = restore(
        root / "checkpoints", tensors, cfg, ranks, reject=lambda _, why: rejected.extend(why)
    )
    return state, digest_whole(tensors), rejected


def memory_in(
    file: str | None,
    tensors: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    every: Every = 1,
    seed: int = 17,
    said: list[str] | None = None,
) -> Memory:
    def report(kind: str, why: str) -> None:
        assert kind == "memory_off"
        (said if said is not None else []).append(why)

    descriptor = None if file is None else os.open(file, os.O_RDWR)
    origin = {"seed": seed}
    return Memory(descriptor, tensors, ranks, every=every, origin=origin, report=report)
