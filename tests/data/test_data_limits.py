"""Laws of bounds: a loader holds no more of a larger dataset, and a cut file is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpt.data.dataset import MAX_OPEN_SHARDS, SHARE_OF_FILES, open_dataset
from mpt.data.index import format_index
from mpt.data.shard import Encoding, ShardInfo, shard_config, write_shard
from mpt.errors import EXIT_DATA, DataError
from tests.data.cases import write_dataset

LENGTH, PER_SHARD = 2048, 16_380
"""Of a sparse shard: 64 MiB."""
N_SPARSE = 1600
"""Of them: 100 GiB."""

LOADING = """
import sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from mpt.data.loader import Loader
from mpt.recipe.data import Data, Stream
from tests.data.cases import small_model

def anonymous_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) for k, v in (line.split(":") for line in lines) if "Rss" in k}

torch.set_num_threads(1)
before = anonymous_kib()
begun = time.process_time()
loader = Loader(
    Data(streams={"a": Stream(path=sys.argv[2])}),
    small_model(2048, vocab_size=50432),
    seed=1,
    global_batch_size=16,
    microbatch_size=16,
    rank=0,
    world_size=1,
    device=torch.device("cpu"),
)
opening_s = time.process_time() - begun
loader.next(0)
settled = anonymous_kib()
shards = set()
n_samples = len(loader._datasets[0])
for k in range(300):  # each in another window: every one opens shards that were not open
    (batch,) = loader.next(k * n_samples // 300)
    assert batch.tokens.sum() == 0
after = anonymous_kib()
print(opening_s, settled["RssAnon"] - before["RssAnon"], after["RssAnon"] - settled["RssAnon"],
      after["RssFile"] - settled["RssFile"])
loader.close()
"""


def sparse_dataset(folder: Path) -> None:
    """100 GiB of zeros that take no room: every shard has a sound head, and a hole."""
    encoding = Encoding("uint16", LENGTH)
    config = json.dumps(shard_config(encoding, 1 << 26, ()), sort_keys=True).encode()
    begin = 4 + 4 * (PER_SHARD + 1) + len(config)
    offsets = begin + 2 * LENGTH * np.arange(PER_SHARD + 1)
    head = np.concatenate([[PER_SHARD], offsets]).astype("<u4").tobytes() + config
    size = int(offsets[-1])
    infos = []
    for number in range(N_SPARSE):
        path = folder / f"shard.{number:05d}.mds"
        path.write_bytes(head)
        os.truncate(path, size)
        infos.append(ShardInfo(path.name, size, PER_SHARD, encoding, {}))
    (folder / "index.json").write_text(format_index(infos, 1 << 26))


def test_memory_does_not_grow_while_a_loader_goes_through_100_gib(tmp_path: Path) -> None:
    sparse_dataset(tmp_path)
    if sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 > 1 << 30:
        pytest.skip("this file system keeps no holes")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(root), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    _, first_kib, growth_kib, file_kib = map(float, done.stdout.split())
    assert first_kib < 50 << 10
    assert growth_kib < 10 << 10
    assert file_kib < 10 << 10


MANY = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
from mpt.data.dataset import open_dataset
datasets = [open_dataset(sys.argv[1]) for _ in range(3)]
shards = np.arange(len(datasets[0].shards))
for dataset in datasets:
    rows = dataset.rows(shards, np.zeros_like(shards))
    assert (rows[:, 0] == 4 * shards).all()
print("read")
"""


def test_many_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    n_shards = 4 * MAX_OPEN_SHARDS
    write_dataset(tmp_path / "set", np.arange(4 * n_shards).reshape(-1, 4), per_shard=1)
    limit = 5 * SHARE_OF_FILES  # each dataset keeps five open
    command = [sys.executable, "-c", MANY, str(tmp_path / "set"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", done.stderr


def test_a_shard_that_is_cut_short_while_it_is_open_is_an_error_and_no_crash(
    tmp_path: Path,
) -> None:
    samples = np.arange(40_000).reshape(10, 4000)
    dataset = write_dataset(tmp_path / "set", samples, dtype="int32", per_shard=10)
    first, last = np.zeros(1, np.int64), np.full(1, 9)
    assert dataset.rows(first, last)[0, 0] == 36_000
    path = tmp_path / "set" / "shard.00000.mds"
    os.truncate(path, path.stat().st_size - 100)
    assert dataset.rows(first, first)[0, 0] == 0
    with pytest.raises(DataError, match=rf"{path}: .* shorter since it was opened") as raised:
        dataset.rows(first, last)
    assert raised.value.exit_code == EXIT_DATA


def test_so_is_one_of_samples_that_vary_in_size(tmp_path: Path) -> None:
    path = tmp_path / "shard.00000.mds"
    encoding = Encoding("int32", None)
    info = write_shard(path, np.arange(40).reshape(10, 4), encoding, size_limit=1, hashes=[])
    (tmp_path / "index.json").write_text(format_index([info], 1))
    dataset = open_dataset(tmp_path)
    first, last = np.zeros(1, np.int64), np.full(1, 9)
    assert dataset.rows(first, last).tolist() == [[36, 37, 38, 39]]
    os.truncate(path, 30)
    with pytest.raises(DataError, match=r"00000\.mds: .* shorter since it was opened"):
        dataset.rows(first, last)
