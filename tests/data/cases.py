"""Small corpora, tokenizers, datasets and recipes for the tests of `mpt.data`."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mpt.data.about import About
from mpt.data.dataset import Dataset, open_dataset
from mpt.data.pack import DatasetWriter
from mpt.data.shard import Encoding
from mpt.recipe.data import Data, EvalData, Prepare, Stream, Tokenizer
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.recipe.train import Optimizer, Train
from mpt.tokenizer import train_tokenizer

VOCAB_SIZE = 300
ABOUT = About(
    tokenizer_sha256="0" * 64,
    vocab_size=VOCAB_SIZE,
    eod_id=0,
    source="test",
    text_key="text",
    split="train",
    eval_fraction=0.0,
    created_by="test",
)


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of a few hundred characters, no two alike."""
    draw = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "été", "def f(x):\n    return x\n", "\t", "🙂"]
    return [" ".join(draw.choices(words, k=draw.randint(20, 120))) + f" {i}" for i in range(count)]


def write_texts(folder: Path, texts: list[str]) -> Path:
    """Write a directory with a file per text."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@lru_cache
def _tokenizer_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        train_tokenizer(some_texts(50), path, vocab_size=VOCAB_SIZE)
        return path.read_bytes()


def write_tokenizer(path: Path) -> Path:
    """Write a tokenizer of VOCAB_SIZE ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_tokenizer_bytes())
    return path


def small_model(max_seq_len: int = 16, vocab_size: int = VOCAB_SIZE) -> Model:
    return Model(d_model=8, n_heads=2, n_layers=1, max_seq_len=max_seq_len, vocab_size=vocab_size)


def recipe_for(folder: Path, source: Path | str, **prepare: Any) -> Recipe:
    """A recipe that prepares `source` within `folder`, with a fifth held out."""
    settings = {"eval_fraction": 0.2, "shard_bytes": 4096} | prepare
    return Recipe(
        run="test",
        model=small_model(),
        tokenizer=Tokenizer(path=f"{folder}/tokenizer.model"),
        data=Data(
            streams={"only": Stream(path=f"{folder}/train")}, eval=EvalData(path=f"{folder}/eval")
        ),
        prepare=Prepare(source=str(source), **settings),
        train=Train(steps=1, global_batch_size=1),
        optimizer=Optimizer(lr=1e-3),
    )


def with_model(recipe: Recipe, **model: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **model))


def write_dataset(
    path: Path, samples: NDArray[Any], *, dtype: str = "uint16", per_shard: int = 7
) -> Dataset:
    """Write samples (n, S) as a dataset, a few to a shard."""
    encoding = Encoding(dtype, samples.shape[1])
    assert encoding.sample_bytes is not None
    path.mkdir()
    writer = DatasetWriter(path, encoding, per_shard * (encoding.sample_bytes + 4))
    writer.write(samples)
    writer.finish(ABOUT)
    return open_dataset(path)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, hidden ones left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
