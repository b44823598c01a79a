"""Laws of exchange with mosaicml-streaming: each reads exactly the samples that the other wrote.

They need an interpreter that has it, named by MPT_STREAMING_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mpt.data.dataset import open_dataset, verify
from mpt.data.loader import Loader
from mpt.recipe.data import Cache, Data, Stream
from tests.data.cases import small_model, write_dataset
from tests.data.faults import compress

PYTHON = os.environ.get("MPT_STREAMING_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="MPT_STREAMING_PYTHON names no interpreter with mosaicml-streaming"
)
ORACLE = Path(__file__).with_name("streaming_oracle.py")
N_CASES = 1 + 3 * 8 + 3 * 4


def oracle(*arguments: str | Path) -> None:
    command = [PYTHON, "-W", "ignore", ORACLE, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    oracle("write", folder)
    return folder


def test_what_it_writes_is_read_exactly(tmp_path: Path, written: Path) -> None:
    names = sorted(path.stem for path in written.glob("*.npy"))
    assert len(names) == N_CASES
    for name in names:
        wanted = np.load(written / f"{name}.npy")
        dataset = open_dataset(written / name, Cache(dir=f"{tmp_path}/cache"))
        assert len(dataset.shards) > 1, name
        assert len(dataset) == len(wanted)
        sizes = dataset.shard_sizes
        shards = np.repeat(np.arange(len(sizes)), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        assert np.array_equal(dataset.rows(shards, rows), wanted.astype(dataset.dtype)), name
        assert verify(dataset) == [], name


def test_a_loader_reads_a_stream_of_each_kind(tmp_path: Path, written: Path) -> None:
    for name in ("bytes", "any-uint16", "uint16-fixed", "zstd-xxh64"):
        wanted = np.load(written / f"{name}.npy")
        stream = {"a": Stream(path=str(written / name))}
        with Loader(
            Data(streams=stream, cache=Cache(dir=f"{tmp_path}/cache"), shuffle=False),
            small_model(wanted.shape[1], vocab_size=1 << 16),
            seed=1,
            global_batch_size=len(wanted),
            microbatch_size=len(wanted),
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        ) as loader:
            (batch,) = loader.next(0)
            assert np.array_equal(batch.tokens.numpy(), wanted)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("zipped", [False, True])
def test_it_reads_exactly_what_ours_wrote_and_finds_every_hash_right(
    tmp_path: Path, dtype: str, zipped: bool
) -> None:
    samples = np.random.default_rng(3).integers(0, np.iinfo(dtype).max, (50, 40), np.int64)
    write_dataset(tmp_path / "set", samples, dtype=dtype)
    if zipped:
        compress(tmp_path / "set")
    oracle("read", tmp_path / "set", tmp_path / "seen.npy")
    assert np.array_equal(np.load(tmp_path / "seen.npy"), samples)
