"""How far above its best the learning rate may be: the published recipe against the shipped ones.

At small scale on the CPU, in fp32, and without what a run does about spikes (`health:`), which
would hide them. A way of training stands a learning rate if its loss at the end is not much above
what it reaches at the rate that is best for the published way.

    python -m tests.bench.stability --out tests/bench/stability.md     (ten minutes of one core)
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpt.data.source import documents, find_source
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.optim import build_optimizer, set_learning_rate, step_unless
from mpt.recipe.init import Init
from mpt.recipe.model import Model
from mpt.recipe.train import Optimizer, Schedule
from mpt.schedule import learning_rate
from mpt.state import Loss
from mpt.tokenizer import load_tokenizer, train_tokenizer

D_MODEL, SAMPLE, VOCABULARY, BATCH, STEPS = 64, 64, 512, 16, 400
MODEL = Model(d_model=D_MODEL, n_heads=4, n_layers=4, max_seq_len=SAMPLE, vocab_size=VOCABULARY)
BEST = 0.008
"""The learning rate at which the published way ends lowest, among 0.002, 0.004, ... 0.128. The
published 6e-4 of d_model 768, carried over as 1/d_model, would be 0.0072."""
STANDS = 0.15
"""Nats per token: a way stands a rate if it ends at most so far above its end at the best rate."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What of a recipe bears on stability."""

    warmup: float = 0.02
    """Fraction of the steps: 100 of 4,800, as published for 125m."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    clip_qkv: float | None = None
    z_loss: float = 0.0
    init: Init = field(default_factory=Init)


PUBLISHED = Way()
SMALL = Init(name="small_init_", emb_init_std=math.sqrt(2 / D_MODEL))
KEPT: dict[str, dict[str, Any]] = {
    "warm-up over 10 %": {"warmup": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "clip_qkv 3": {"clip_qkv": 3.0},
    "small_init_, but for the embedding": {"init": SMALL},
}
OURS = replace(PUBLISHED, **{key: value for way in KEPT.values() for key, value in way.items()})
DROPPED: dict[str, dict[str, Any]] = {
    "small_init_": {"init": Init(name="small_init_")},
    "clip_qkv 6": {"clip_qkv": 6.0},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "beta2 0.99": {"betas": (0.9, 0.99)},
    "eps 1e-6": {"eps": 1e-6},
    "gradients clipped to 0.3": {"max_grad_norm": 0.3},
}


def final_loss(way: Way, lr: float, seed: int, data: Tensor) -> float:
    """Return the mean loss of the last tenth of a run, on samples never seen before."""
    cfg = replace(MODEL, clip_qkv=way.clip_qkv, init_config=way.init)
    model = MPT(cfg, "sdpa", way.z_loss)
    initialise(model, cfg, seed)
    optimizer = build_optimizer(
        model,
        Optimizer(lr=lr, betas=way.betas, eps=way.eps, weight_decay=way.weight_decay),
    )
    schedule = Schedule(warmup_steps=int(way.warmup * STEPS))
    losses = []
    for step, batch in zip(range(STEPS), _batches(data, seed), strict=False):
        set_learning_rate(optimizer, learning_rate(schedule, lr, step, STEPS))
        loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        assert isinstance(loss, Loss)
        (loss.objective / (BATCH * SAMPLE)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), way.max_grad_norm)
        step_unless(optimizer, ~torch.isfinite(loss.nats + norm))
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.nats) / (BATCH * SAMPLE))
    return statistics.fmean(losses[-STEPS // 10 :])


def _batches(data: Tensor, seed: int) -> Iterator[Tensor]:
    samples = data[: len(data) // (SAMPLE + 1) * (SAMPLE + 1)].view(-1, SAMPLE + 1)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    assert len(samples) >= BATCH * STEPS, "no sample is seen twice"
    return (samples[ids] for ids in order.split(BATCH))


def tokens(n_documents: int = 900) -> Tensor:
    """Return modules of the standard library as tokens, one after another, int64."""
    texts = [document.text for document in documents(find_source("python-stdlib"), lambda *_: None)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order[:n_documents]]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.model")
        train_tokenizer(texts[: n_documents // 5], path, vocab_size=VOCABULARY)
        tokenizer = load_tokenizer(path)
    ids = [i for text in tokenizer.encode_batch(texts) for i in (*text, tokenizer.eod_id)]
    return torch.tensor(ids)


class Run(NamedTuple):
    """One training: how, at which multiple of the best rate, and from which seed."""

    way: Way
    multiple: float
    seed: int


def plan() -> dict[str, list[tuple[str, list[Run]]]]:
    """Return the rows of each table: what is compared, and the runs it takes."""

    def row(name: str, way: Way, *runs: tuple[float, int]) -> tuple[str, list[Run]]:
        return name, [Run(way, multiple, seed) for multiple, seed in runs]

    whole = [(0.5, 0), *((1, seed) for seed in range(3)), (2, 0)]
    whole += [*((4, seed) for seed in range(3)), (8, 0)]
    return {
        "The published way and ours": [
            row("published", PUBLISHED, *whole),
            row("ours", OURS, *whole),
        ],
        "The published way with one change": [
            row(name, replace(PUBLISHED, **change), (4, 0))
            for name, change in (KEPT | DROPPED).items()
        ],
        "Ours with one thing changed back": [
            row(
                f"without {name}",
                replace(OURS, **{key: getattr(PUBLISHED, key) for key in change}),
                (4, 0),
                (8, 0),
            )
            for name, change in KEPT.items()
        ]
        + [row("with z-loss 1e-4", replace(OURS, z_loss=1e-4), (4, 0), (8, 0))],
    }


def measure(workers: int) -> dict[Run, float]:
    """Return the final loss of every run of the plan."""
    wanted = {run for rows in plan().values() for _, runs in rows for run in runs}
    ordered = sorted(wanted, key=lambda run: (run.seed, run.multiple))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokens.pt")
        torch.save(tokens(), path)
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(workers, _prepare, (str(path),)) as pool:
            for run, loss in pool.imap_unordered(_one, ordered):
                found[run] = loss
                print(f"{loss:.3f} {run}", file=sys.stderr, flush=True)
    return found


_data: Tensor


def _prepare(path: str) -> None:
    global _data
    torch.set_num_threads(1)
    _data = torch.load(path, weights_only=True)


def _one(run: Run) -> tuple[Run, float]:
    return run, final_loss(run.way, run.multiple * BEST, run.seed, _data)


def report(found: dict[Run, float]) -> str:
    """Return the tables, in Markdown."""
    best = statistics.fmean(found[run] for run in found if run[:2] == (PUBLISHED, 1))
    lines = [
        "# How far above its best the learning rate may be",
        "",
        "`python -m tests.bench.stability --out tests/bench/stability.md`",
        f"on {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"fp32. d_model {D_MODEL}, {MODEL.n_layers} blocks, {SAMPLE} tokens a sample, {BATCH} "
        f"samples a step, {STEPS} steps of modules of the standard library, each seen once.",
        "",
        "Both ways train the released shape: ALiBi, no biases, tied. The published one is that of "
        f"llm-foundry's recipes: {_told(PUBLISHED)}. Ours: {_told(OURS)}.",
        "",
        "Loss (nats per token) over the last tenth of a run, for each seed. The published way does "
        f"best at 1x = {BEST}, where it ends at {best:.2f}. A way *stands* a rate at which it ends "
        f"below {best + STANDS:.2f}, whatever the seed.",
    ]
    for title, rows in plan().items():
        multiples = sorted({run.multiple for _, runs in rows for run in runs})
        lines += ["", f"## {title}", "", "| | " + " | ".join(f"{m:g}x" for m in multiples) + " |"]
        lines.append("|---" * (len(multiples) + 1) + "|")
        for name, runs in rows:
            cells = []
            for multiple in multiples:
                losses = [found[run] for run in runs if run.multiple == multiple]
                stands = max(losses) <= best + STANDS
                text = ", ".join(f"{loss:.2f}" for loss in losses)
                cells.append(f"**{text}** stands" if stands else text)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _told(way: Way) -> str:
    emb = way.init.emb_init_std
    embedding = "" if emb is None else f" with an embedding of standard deviation {emb:.3f}"
    return (
        f"{way.init.name}{embedding}, warm-up over {way.warmup:.0%} of the steps, weight decay "
        f"{way.weight_decay:g}, clip_qkv {way.clip_qkv}, betas {way.betas}, eps {way.eps:g}, "
        f"gradients clipped to {way.max_grad_norm:g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    text = report(measure(arguments.workers))
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
