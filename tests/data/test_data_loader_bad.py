"""Laws of bad samples: each is named, none reaches a device, and leaving them out is the same
at any world size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpt.data.dataset import open_dataset
from mpt.data.index import INDEX_NAME, format_index
from mpt.data.loader import eval_batches
from mpt.data.shard import Encoding, write_shard
from mpt.errors import DataError
from mpt.recipe.data import Data, Stream
from mpt.state import IGNORE, BadSample, Microbatch
from tests.data.cases import write_dataset
from tests.data.test_data_loader import CPU, LENGTH, MODEL, loader_for

N, PER_SHARD = 40, 7
TOO_LARGE, NEGATIVE = 5, 23
"""Samples of the dataset with a token id outside the vocabulary."""


@pytest.fixture
def data(tmp_path: Path) -> Data:
    samples = np.arange(N * LENGTH).reshape(N, LENGTH)
    samples[TOO_LARGE, 1], samples[NEGATIVE, LENGTH - 1] = MODEL.vocab_size, -1
    write_dataset(tmp_path / "a", samples, dtype="int32", per_shard=PER_SHARD)
    return Data(streams={"a": Stream(path=f"{tmp_path}/a")}, on_bad_sample="skip")


def read(data: Data, world_size: int, *, microbatch_size: int = 3) -> list[Microbatch]:
    """All microbatches of an epoch of four batches, of all ranks."""
    found = []
    for rank in range(world_size):
        with loader_for(
            data, rank=rank, world_size=world_size, microbatch_size=microbatch_size
        ) as loader:
            for start in range(0, N, 10):
                found += loader.next(start)
    return found


def skipped(microbatches: list[Microbatch]) -> set[tuple[str, int]]:
    return {(Path(b.shard).name, b.row) for m in microbatches for b in m.skipped}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_bad_sample_has_no_targets_and_all_others_have_theirs(
    data: Data, world_size: int
) -> None:
    microbatches = read(data, world_size)
    assert sum(len(m.skipped) for m in microbatches) == 2
    assert skipped(microbatches) == {
        (f"shard.{n // PER_SHARD:05d}.mds", n % PER_SHARD) for n in (TOO_LARGE, NEGATIVE)
    }
    tokens = torch.cat([m.tokens for m in microbatches])
    targets = torch.cat([m.targets for m in microbatches])
    assert 0 <= tokens.min() <= tokens.max() < MODEL.vocab_size
    taken = (targets != IGNORE).any(dim=1)
    sound = [LENGTH * n for n in range(N) if n not in (TOO_LARGE, NEGATIVE)]
    assert sorted(tokens[taken][:, 0].tolist()) == sound
    assert (targets != IGNORE).sum() == (N - 2) * (LENGTH - 1)  # what the loss is divided by
    assert (tokens[~taken] == 0).all()


def test_a_microbatch_names_those_that_it_lacks(data: Data) -> None:
    for m in read(data, 1, microbatch_size=1):
        assert len(m.skipped) <= 1
        if m.skipped:
            assert (m.targets == IGNORE).all()
    (large,) = (b for m in read(data, 1) for b in m.skipped if b.row == TOO_LARGE)
    assert large == BadSample(
        "a",
        f"{data.streams['a'].path}/shard.00000.mds",
        TOO_LARGE,
        "token id 1000 is outside the vocabulary; model.vocab_size is 1000",
    )


def test_who_does_not_skip_gets_an_error_that_names_it_and_says_how_to(data: Data) -> None:
    strict = replace(data, on_bad_sample="error", shuffle=False)
    words = rf"a: .*/shard\.00000\.mds: row {TOO_LARGE}: token id 1000 is .*on_bad_sample=skip"
    with loader_for(strict) as loader, pytest.raises(DataError, match=words):
        loader.next(0)


def of_lengths(folder: Path, lengths: list[int]) -> Path:
    """Write a dataset whose samples say how long they are."""
    folder.mkdir()
    samples = [np.full(length, number) for number, length in enumerate(lengths)]
    encoding = Encoding("int32", None)
    info = write_shard(folder / "shard.00000.mds", samples, encoding, size_limit=1)
    (folder / INDEX_NAME).write_text(format_index([info], 1))
    return folder


def test_a_sample_of_another_length_is_bad_too(tmp_path: Path) -> None:
    folder = of_lengths(tmp_path / "x", [LENGTH] * 4 + [LENGTH - 1, LENGTH, LENGTH + 3, LENGTH])
    lenient = Data(streams={"x": Stream(path=str(folder))}, on_bad_sample="skip")
    with loader_for(lenient, global_batch_size=8) as loader:
        microbatches = loader.next(0)
    bad = sorted((b.row, b.why) for m in microbatches for b in m.skipped)
    assert bad == [(4, "has 3 tokens, not 4"), (6, "has 7 tokens, not 4")]
    taken = torch.cat([m.tokens[(m.targets != IGNORE).any(dim=1), 0] for m in microbatches])
    assert sorted(taken.tolist()) == [0, 1, 2, 3, 5, 7]
    strict = replace(lenient, on_bad_sample="error")
    with (
        loader_for(strict, global_batch_size=8) as loader,
        pytest.raises(DataError, match=r"x: .*shard\.00000\.mds: corrupt shard: row [46] has"),
    ):
        loader.next(0)


def test_a_shard_that_cannot_be_read_is_no_bad_sample(data: Data) -> None:
    with loader_for(data) as loader:
        for path in Path(data.streams["a"].path).glob("*.mds"):
            path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"corrupt shard: it has \d+ bytes; the index says"):
            loader.next(0)


def test_held_out_samples_are_never_skipped(data: Data) -> None:
    batches = eval_batches(
        open_dataset(data.streams["a"].path),
        MODEL,
        samples=None,
        microbatch_size=N,
        rank=0,
        world_size=1,
        device=CPU,
    )
    with pytest.raises(DataError, match=rf"eval: .*row {TOO_LARGE}: token id 1000 is outside"):
        next(batches)
