"""The tables of scaling.md: what more GPUs cost each of them, on paper, and the published check.

python -m tests.bench.scaling
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mpt.bench.scaling import Cluster, step
from mpt.recipe import load
from mpt.recipe.model import Model

RECIPES = Path(__file__).parent.parent.parent / "recipes"
PUBLISHED = {
    "7b": (6, {128: 45.71, 256: 44.15, 512: 42.20}),
    "13b": (16, {128: 42.18, 256: 41.42, 512: 41.12}),
    "30b": (8, {128: 41.85, 256: 40.89, 512: 40.27}),
    "70b": (8, {128: 43.36, 256: 42.42, 512: 41.25}),
}
"""llm-foundry, scripts/train/benchmarking: samples a GPU, and MFU in per cent by GPUs; H100, 2,048
tokens, one microbatch a step, fully sharded."""
ASSUMED_MFU = 0.45
"""Of a GPU on its own, for what is predicted: llm-foundry's on one node. Ours is not measured."""


def model_of(size: str) -> Model:
    return replace(load(RECIPES / f"mpt-{size}.yaml").model, max_seq_len=2048)


def predicted(size: str, gpus: int) -> float:
    """Return the MFU, in per cent, that the one at 128 GPUs makes one expect."""
    samples, published = PUBLISHED[size]
    first = min(published)

    def slowdown(n: int) -> float:
        mfu = published[first] / 100
        return step(
            model_of(size), Cluster(gpus=n), microbatch_size=samples, mfu_alone=mfu
        ).slowdown

    return published[first] * slowdown(first) / slowdown(gpus)


def check() -> Iterator[str]:
    """Yield the table of what was published beside what is predicted from its first column."""
    columns = ["", "samples a GPU", "128 GPUs, published", "256, published", "predicted"]
    columns += ["512, published", "predicted"]
    yield from _head(columns)
    for size, (samples, published) in PUBLISHED.items():
        cells = [f"{size}", f"{samples}", f"{published[128]:.1f} %"]
        for gpus in (256, 512):
            cells += [f"{published[gpus]:.1f} %", f"{predicted(size, gpus):.1f} %"]
        yield f"| {' | '.join(cells)} |"


def forecast(name: str, tokens_per_step: int, *, hybrid: bool) -> Iterator[str]:
    """Yield the table of one recipe's step, the global batch as the recipe has it."""
    model = model_of(name)
    columns = ["GPUs", "samples a GPU", "PFLOP", "gathered, GB", "reduced, GB", "computing, s"]
    columns += ["communicating, s", "in sight, s", "lost, s", "of one node's speed"]
    yield from _head(columns)
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        samples = tokens_per_step // model.max_seq_len // gpus
        if samples < 1:
            continue
        most = 8  # samples that a microbatch of these sizes has on 80 GB
        n_microbatches = -(-samples // most)
        done = step(
            model,
            Cluster(gpus=gpus),
            microbatch_size=samples // n_microbatches,
            n_microbatches=n_microbatches,
            mfu_alone=ASSUMED_MFU,
            hybrid=hybrid,
        )
        cells = [f"{gpus:,}", f"{samples}", f"{done.flops / 1e15:,.1f}"]
        cells += [f"{size / 1e9:,.0f}" for size in (done.gathered_bytes, done.reduced_bytes)]
        parts = (done.compute_s, done.communication_s, done.exposed_s, done.lost_s)
        cells += [f"{seconds:.2f}" for seconds in parts]
        yield f"| {' | '.join(cells)} | {1 / done.slowdown:.0%} |"


def _head(columns: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def main() -> None:
    """Print all tables."""
    print("\n".join(check()))
    for size in ("7b", "30b"):
        batch = load(RECIPES / f"mpt-{size}.yaml").train.global_batch_size * 2048
        for hybrid in (False, True):
            kind = "sharded over a node, replicated over nodes (HSDP)" if hybrid else "FSDP"
            print(f"\n**{size}, {kind}, {batch:,} tokens a step**\n")
            print("\n".join(forecast(size, batch, hybrid=hybrid)))


if __name__ == "__main__":
    main()
