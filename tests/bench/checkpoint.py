"""What checkpoints cost: the time that training waits for a save, and a load beside the disk's own.

    python -m tests.bench.checkpoint --dir /a/disk --out tests/bench/checkpoint.md

The state is that of a shipped recipe on one rank, saved and restored by the code of training. The
disk is asked right before and after: the same bytes written by one plain write with fsync, and
read by plain reads; cold is after the kernel was told to forget the files.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpt import recipe
from mpt.bench.measure import Course
from mpt.checkpoint.load import restore
from mpt.checkpoint.save import Origin, Saver
from mpt.dist import Ranks, local_tensor, process_group
from mpt.recipe import Recipe
from mpt.rundir import CHECKPOINTS, versions
from mpt.state import RunState

RECIPES = Path(__file__).parent.parent.parent / "recipes"
BLOCK_BYTES = 1 << 23
SAVES = 5


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(directory: Path) -> None:
    """Have the kernel drop what it keeps of the files in memory."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on disk yet would be kept
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(directory: Path) -> None:
    """Read every byte of the files, and nothing else."""
    buffer = bytearray(BLOCK_BYTES)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_plainly(path: Path, size: int) -> None:
    """Write as many bytes, and wait until they are on the disk."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // BLOCK_BYTES)):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()


def measure(cfg: Recipe, root: Path, ranks: Ranks) -> Iterator[str]:
    """Yield the lines about one recipe."""
    with Course.prepared(_one_sample(cfg), ranks, real=False) as course:
        course.take(1)
        sample_s = statistics.median(lap.whole for lap in course.take(2))
        tensors = course.tensors()
        step_s = sample_s * cfg.train.global_batch_size
        (root / "tokenizer.model").write_bytes(b"stands for a tokenizer")
        origin = Origin(cfg.model, "bench", root / "tokenizer.model", versions())
        saves: list[dict[str, Any]] = []
        saver = Saver(
            root / CHECKPOINTS,
            tensors,
            origin,
            ranks,
            keep=1,
            report=lambda kind, **fields: saves.append({"kind": kind, **fields}),
            attempt=0,
            newer=lambda: None,
        )
        for step in range(1, SAVES + 1):
            saver.save(RunState(step, step, step))
            saver.wait()
        saver.close()
        assert {save["kind"] for save in saves} == {"checkpoint"}, saves
        directory = Path(saves[-1]["path"])
        size = sum(path.stat().st_size for path in directory.iterdir())
        blocked = statistics.median(save["blocked_s"] for save in saves)
        interval_s = step_s * cfg.checkpoint.every_steps
        written = statistics.median(save["write_s"] for save in saves)
        plain = statistics.median(
            seconds(lambda: write_plainly(root / "plain", size)) for _ in range(3)
        )
        yield f"**{cfg.run}**: {size / 1e6:,.0f} MB in {len(list(directory.iterdir()))} files"
        yield ""
        yield "| | seconds | beside |"
        yield "|---|---|---|"
        yield (
            f"| training waits for a save | {blocked:.4f} | {blocked / interval_s:.5%} of the "
            f"{cfg.checkpoint.every_steps:,} steps between two, {step_s:,.2f} s each here |"
        )
        yield (
            f"| write, hash, fsync and commit, in the background | {written:.2f} | "
            f"{plain:.2f} s for a plain write with fsync, {size / plain / 1e6:,.0f} MB/s |"
        )
        for name, prepare in (("cold", forget), ("in the page cache", read_plainly)):
            ratios, loads = [], []
            for _ in range(3):
                prepare(directory)
                alone = seconds(lambda: read_plainly(directory))
                prepare(directory)
                loads.append(seconds(lambda: _load(root, tensors, cfg, ranks)))
                ratios.append(alone / loads[-1])
            yield (
                f"| verify and load, {name} | {statistics.median(loads):.2f} | "
                f"{statistics.median(ratios):.0%} of a plain read's speed |"
            )
        yield ""


def _one_sample(cfg: Recipe) -> Recipe:
    """The same model, with steps that are short; a step is so many of them."""
    train = replace(cfg.train, global_batch_size=1, microbatch_size=1, compile=False)
    return replace(cfg, train=train)


def _load(root: Path, tensors: dict[str, torch.Tensor], cfg: Recipe, ranks: Ranks) -> None:
    state = restore(root / CHECKPOINTS, tensors, cfg.model, ranks, reject=print)
    assert state is not None
    assert all(local_tensor(t).isfinite().all() for t in list(tensors.values())[:1])


def main() -> None:
    """Print the document, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["tiny", "mpt-125m"])
    parser.add_argument("--dir", type=Path, help="where to write; default: the current folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_flush_denormal(True)
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, medians of {SAVES} saves and 3 loads.",
        "",
    ]
    with process_group() as ranks:
        for name in arguments.recipes:
            root = Path(tempfile.mkdtemp(prefix="mpt-checkpoint-", dir=arguments.dir or "."))
            try:
                lines += measure(recipe.load(RECIPES / f"{name}.yaml"), root, ranks)
            finally:
                shutil.rmtree(root)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
