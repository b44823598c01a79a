"""MB of text per second that `prepare` tokenizes, beside the tokenizer alone on the same text.

    python tests/bench/prepare.py

The text is Python's standard library and the packages installed beside it, each file a line of one
JSONL file. Rounds of all cases are interleaved; what is shown are medians. A second of the CPU
counts the same on a machine that others use too; it includes reading, hashing and writing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import sentencepiece

from mpt.data.prepare import prepare
from mpt.data.source import documents, find_source
from mpt.recipe.data import Data, Prepare, Stream, Tokenizer
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.recipe.train import Optimizer, Train
from mpt.tokenizer import load_tokenizer, train_tokenizer

VOCAB_SIZE = 4096


def texts(limit_bytes: int) -> Iterator[str]:
    """Yield source files, until they are so many bytes."""
    size = 0
    for source in ("python-stdlib", sysconfig.get_path("purelib") + "/**/*.py"):
        for document in documents(find_source(source), lambda *_: None):
            yield document.text
            size += len(document.text.encode())
            if size >= limit_bytes:
                return


def tokenizer_alone(tokenizer: Path, texts: list[str]) -> None:
    """Tokenize everything on one core, and keep none of it."""
    loaded = load_tokenizer(tokenizer)
    for start in range(0, len(texts), 100):
        loaded.encode_batch(texts[start : start + 100], n_threads=1)


def prepared(folder: Path, source: Path, workers: int) -> None:
    """Make a dataset and remove it."""
    recipe = Recipe(
        run="bench",
        model=Model(d_model=8, n_heads=2, n_layers=1, max_seq_len=2048, vocab_size=VOCAB_SIZE),
        tokenizer=Tokenizer(path=f"{folder}/tokenizer.model"),
        data=Data(streams={"only": Stream(path=f"{folder}/train")}),
        prepare=Prepare(source=str(source)),
        train=Train(steps=1, global_batch_size=1),
        optimizer=Optimizer(lr=1e-3),
    )
    prepare(recipe, workers=workers)
    shutil.rmtree(folder / "train")


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds that pass, and those of the CPU's work, in all processes."""
    before, begun = os.times(), time.perf_counter()
    run()
    passed, after = time.perf_counter() - begun, os.times()
    return passed, sum(after[:4]) - sum(before[:4])


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = list(texts(asked.megabytes * 10**6))
        size = sum(len(text.encode()) for text in found)
        source = folder / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        tokenizer = folder / "tokenizer.model"
        train_tokenizer(found[::10], tokenizer, vocab_size=VOCAB_SIZE)
        cases = {"tokenizer alone": partial(tokenizer_alone, tokenizer, found)}
        for workers in asked.workers:
            cases[f"prepare --workers {workers}"] = partial(prepared, folder, source, workers)
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(asked.rounds):
            for case, run in cases.items():
                times[case].append(seconds(run))
    print(
        f"sentencepiece {sentencepiece.__version__}, Python {platform.python_version()}, ", end=""
    )
    print(f"{size / 1e6:.1f} MB in {len(found)} documents, {asked.rounds} rounds")
    print(f"{'':24}{'MB/s':>8}{'MB per CPU s':>14}{'of tokenizer':>14}")
    alone_s = median(cpu for _, cpu in times["tokenizer alone"])
    for case, rows in times.items():
        passed_s, cpu_s = (median(column) for column in zip(*rows, strict=True))
        rates = f"{size / 1e6 / passed_s:>8.2f}{size / 1e6 / cpu_s:>14.2f}"
        print(f"{case:24}{rates}{alone_s / cpu_s:>14.0%}")


if __name__ == "__main__":
    main()
