"""Laws of loaders on several nodes: together they read the batch, and each fetches its part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mpt.data.ahead import NodePart
from mpt.data.dataset import open_dataset
from mpt.data.loader import Loader
from mpt.data.order import WINDOW_SHARDS
from mpt.errors import DataError
from mpt.recipe.data import Cache, Data, Phase, Stream
from mpt.state import IGNORE
from tests.data.cases import write_dataset
from tests.data.faults import serving
from tests.data.test_data_loader import CPU, LENGTH, MODEL

BATCH = 256
ROWS = 80
"""Of a shard."""
BASE = MODEL.vocab_size
STEPS = WINDOW_SHARDS * ROWS // BATCH
"""In a window."""


def write_numbered(folder: Path, shards: int) -> Path:
    """Write samples whose first two tokens are the digits of their number."""
    samples = np.zeros((shards * ROWS, LENGTH), np.int64)
    samples[:, 0], samples[:, 1] = np.divmod(np.arange(shards * ROWS), BASE)
    write_dataset(folder, samples, per_shard=ROWS)
    return folder


def loader(data: Data, rank: int, world_size: int, node: range) -> Loader:
    return Loader(
        data,
        MODEL,
        seed=17,
        global_batch_size=BATCH,
        microbatch_size=32,
        rank=rank,
        world_size=world_size,
        device=CPU,
        node_ranks=node,
    )


def numbers(loader: Loader, steps: Sequence[int]) -> list[list[int]]:
    """The samples that take a loss, a list a step."""
    found = []
    for step in steps:
        microbatches = loader.next(BATCH * step)
        tokens = torch.cat([m.tokens for m in microbatches])
        taken = (torch.cat([m.targets for m in microbatches]) != IGNORE).any(dim=1)
        found.append((tokens[taken, 0] * BASE + tokens[taken, 1]).tolist())
    return found


def test_nodes_of_different_size_read_one_batch_and_each_fetches_its_own_shards(
    tmp_path: Path,
) -> None:
    folder = write_numbered(tmp_path / "set", 2 * WINDOW_SHARDS)
    data = Data(streams={"a": Stream(path=str(folder))})
    with loader(data, 0, 1, range(1)) as alone:
        wanted = [sorted(step) for step in numbers(alone, range(STEPS))]
    together: list[list[int]] = [[] for _ in range(STEPS)]
    nodes = [range(2), range(2, 3), range(3, 8)]
    for node in nodes:
        cache = Cache(dir=f"{tmp_path}/cache-{node.start}")  # each node has its own disk
        touched = set()
        with serving(folder) as server:
            remote = Data(streams={"a": Stream(path=server.url)}, cache=cache)
            for rank in node:
                with loader(remote, rank, 8, node) as mine:
                    for step, found in enumerate(numbers(mine, range(STEPS))):
                        together[step] += found
                        touched |= {number // ROWS for number in found}
            asked = [name for name, _ in server.requests if name.endswith(".mds")]
        assert len(asked) == len(set(asked)), "the ranks of a node fetch a shard once"
        low, high = NodePart(node, 8).interval(BATCH)
        # Of three windows, since reading ahead comes to the second one, and of each a piece of a
        # shard at both ends.
        most = 3 * ((high - low) * WINDOW_SHARDS + 2)
        assert len(touched) <= len(asked) <= most
    assert [sorted(step) for step in together] == wanted


def test_the_limit_of_a_cache_is_checked_against_a_node_s_part(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "set", 3 * WINDOW_SHARDS)
    each = open_dataset(folder).shards[0].file_bytes
    with serving(folder) as server:
        streams = {"a": Stream(path=server.url)}
        # Of eight ranks with batches of 256, the first may need 21 % of two windows, and a piece of
        # a shard at four ends.
        for node, n_shards in ((range(8), 2 * WINDOW_SHARDS), (range(1), 11)):
            for limit in (n_shards * each, (n_shards - 1) * each):
                data = Data(streams=streams, cache=Cache(dir=f"{tmp_path}/c", limit_bytes=limit))
                if limit == n_shards * each:
                    loader(data, 0, 8, node).close()
                    continue
                with pytest.raises(DataError, match="this node's part of two windows"):
                    loader(data, 0, 8, node)


def test_a_curriculum_reaches_the_batches_and_a_stream_runs_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_numbered(tmp_path / name, 4)
    later = (
        Phase(from_step=1, weights={"a": 0.0, "b": 1.0}),
        Phase(from_step=2, weights={"a": 1.0, "b": 0.0}),
    )
    paths = {name: f"{tmp_path}/{name}" for name in ("a", "b")}
    of_a = Stream(path=paths["a"], weight=1.0)
    data = Data(streams={"a": of_a, "b": Stream(path=paths["b"], weight=0.0)}, curriculum=later)
    with (
        loader(data, 0, 1, range(1)) as mixed,
        loader(Data(streams={"a": of_a}), 0, 1, range(1)) as only_a,
    ):
        first, _, third = numbers(mixed, range(3))
        plain = numbers(only_a, range(2))
    assert [first, third] == plain  # as if the second batch had not been
