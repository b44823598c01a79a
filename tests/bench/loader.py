"""Tokens per second of reading local shards: this loader, mosaicml-streaming, a bare memory map.

    python tests/bench/loader.py --streaming-python venv-streaming/bin/python

All read the same shards of 2,048 uint16 tokens a sample, from the page cache. Rounds of all cases
are interleaved; what is shown are medians, and from the least to the most. A second of the CPU
counts the same on a machine that others use too.

- mpt: `Loader.next`, as training calls it: order, reading, checks, microbatches and their targets.
- bare map: a loop over random rows of a numpy.memmap per shard, copied to int64: tokens alone; or
  tokens and targets, as nanoGPT's get_batch makes them.
- streaming, n workers: StreamingDataset(shuffle=True) in a DataLoader of n worker processes, tokens
  copied to int64 and stacked: no targets. It runs in the interpreter given, or is left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpt.data.dataset import Dataset
from mpt.data.loader import Loader
from mpt.launch.plan import GLIBC_KEEPS_MEMORY
from mpt.recipe.data import Data, Stream
from mpt.recipe.model import Model
from tests.data.cases import write_dataset

LENGTH, VOCAB_SIZE = 2048, 50_432
SAMPLE_BYTES = 2 * LENGTH + 4
Spent = tuple[float, float]  # seconds that passed, and those of the CPU's work

STREAMING = Path(__file__).parents[1] / "oracle" / "streaming_speed.py"


def main() -> None:
    """Time all cases and print a table."""
    asked = _arguments().parse_args()
    if any(os.environ.get(key) != value for key, value in GLIBC_KEEPS_MEMORY.items()):
        # As a worker is started; glibc reads these once.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | GLIBC_KEEPS_MEMORY)
    torch.set_num_threads(1)
    n_samples = asked.batches * asked.batch_size
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "set"
        samples = np.random.default_rng(0).integers(
            0, VOCAB_SIZE, (asked.megabytes * 10**6 // SAMPLE_BYTES, LENGTH), np.uint16
        )
        dataset = write_dataset(folder, samples, per_shard=(1 << 26) // SAMPLE_BYTES)
        cases: dict[str, Callable[[], Spent]] = {
            "mpt": stack.enter_context(_loader(folder, asked.batch_size, asked.batches)),
            "bare map, tokens": _bare(dataset, asked.batch_size, asked.batches, targets=False),
            "bare map, tokens and targets": _bare(
                dataset, asked.batch_size, asked.batches, targets=True
            ),
        }
        for n_workers in asked.workers if asked.streaming_python else []:
            arguments = [asked.streaming_python, STREAMING, folder, n_workers]
            run = stack.enter_context(_streaming([*arguments, asked.batch_size], asked.batches))
            cases[f"streaming, {n_workers} workers"] = run
        spent: dict[str, list[Spent]] = {case: [] for case in cases}
        for number in range(asked.rounds + 1):  # the first round fills caches, and does not count
            for case, run in cases.items():
                if number:
                    spent[case].append(run())
                else:
                    run()
        _print(spent, n_samples * LENGTH, asked, len(dataset.shards))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streaming-python", help="an interpreter with mosaicml-streaming")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="of a round")
    parser.add_argument("--batch-size", type=int, default=256, help="samples")
    return parser


@contextmanager
def _loader(folder: Path, batch_size: int, n_batches: int) -> Iterator[Callable[[], Spent]]:
    model = Model(d_model=8, n_heads=2, n_layers=1, max_seq_len=LENGTH, vocab_size=VOCAB_SIZE)
    with Loader(
        Data(streams={"only": Stream(path=str(folder))}),
        model,
        seed=1,
        global_batch_size=batch_size,
        microbatch_size=16,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
    ) as loader:
        starts = iter(range(0, sys.maxsize, batch_size))
        yield partial(_timed, lambda: loader.next(next(starts)), n_batches)


def _bare(
    dataset: Dataset, batch_size: int, n_batches: int, *, targets: bool
) -> Callable[[], Spent]:
    """Return what reads random samples, a row of a map at a time."""
    maps = []
    for shard in dataset.shards:
        assert shard.encoding.sample_bytes is not None
        begin = shard.file_bytes - shard.samples * shard.encoding.sample_bytes
        path = dataset.path / shard.basename
        maps.append(np.asarray(np.memmap(path, "<u2", "r", begin, (shard.samples, LENGTH))))
    draw = np.random.default_rng(2)

    def batch() -> list[NDArray[Any]]:
        numbers = draw.integers(len(dataset), size=batch_size)
        shards, rows = np.divmod(numbers, dataset.shards[0].samples)
        tokens = np.empty((batch_size, LENGTH), np.int64)
        found = [tokens]
        if targets:
            found.append(np.empty_like(tokens))
            found[1][:, -1] = -100
        for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            sample = maps[shard][row]
            tokens[place] = sample
            if targets:
                found[1][place, :-1] = sample[1:]
        return found

    return partial(_timed, batch, n_batches)


def _timed(read: Callable[[], object], n_batches: int) -> Spent:
    """Read batches; the last three are held, as a step and those read ahead hold them."""
    held: list[object] = []
    begun, before = time.perf_counter(), time.process_time()
    for _ in range(n_batches):
        held = [*held[-2:], read()]
    return time.perf_counter() - begun, time.process_time() - before


@contextmanager
def _streaming(command: list[Any], n_batches: int) -> Iterator[Callable[[], Spent]]:
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines, answers = process.stdin, process.stdout
        if answers.readline() != "ready\n":
            raise SystemExit(f"{command[0]}: mosaicml-streaming does not run there.")

        def run() -> Spent:
            print(n_batches, file=lines, flush=True)
            passed_s, cpu_s = map(float, answers.readline().split())
            return passed_s, cpu_s

        yield run
        lines.close()


def _print(
    spent: dict[str, list[Spent]], n_tokens: int, asked: argparse.Namespace, n_shards: int
) -> None:
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"{n_shards} shards, batches of {asked.batch_size} samples of {LENGTH} tokens, "
        f"{asked.rounds} rounds of {asked.batches} batches; millions of tokens"
    )
    print(f"| {'':30}| {'a second':24}| {'a CPU second':24}| mpt is, a CPU second |")
    print("|---|---|---|---|")
    ours = median(cpu for _, cpu in spent["mpt"])
    for case, rounds in spent.items():
        rates = [[n_tokens / row[column] / 1e6 for row in rounds] for column in (0, 1)]
        columns = [f"{median(r):,.1f} ({min(r):,.1f} to {max(r):,.1f})" for r in rates]
        times = median(cpu for _, cpu in rounds) / ours
        print(f"| {case:30}| {columns[0]:24}| {columns[1]:24}| {times:.2f}x |")


if __name__ == "__main__":
    main()
