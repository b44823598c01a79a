"""Laws of the sample order: each sample once an epoch, by the weights, however it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data.mixture import Mixture
from mpt.data.order import WINDOW_SHARDS, Order, rank_slice
from mpt.data.shuffle import mix, permute

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(sum)
STREAMS = st.lists(SIZES, min_size=1, max_size=4)
SEEDS = st.integers(0, 2**63 - 1)


def order_of(
    streams: list[list[int]],
    weights: list[float] | None = None,
    *,
    seed: int = 17,
    shuffle: bool = True,
) -> Order:
    sizes = [np.array(stream, np.int64) for stream in streams]
    return Order(sizes, Mixture.constant(weights or [1.0] * len(streams)), seed, shuffle)


def triples(order: Order, positions: np.ndarray) -> np.ndarray:
    """(n, 3): stream, shard, row."""
    at = order.locate(positions.astype(np.int64))
    return np.stack([at.stream, at.shard, at.row], axis=1)


@given(SIZES, SEEDS, st.booleans())
@settings(deadline=None)
def test_each_epoch_visits_each_sample_exactly_once(
    sizes: list[int], seed: int, shuffle: bool
) -> None:
    order, n = order_of([sizes], seed=seed, shuffle=shuffle), sum(sizes)
    everything = [(0, shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    for epoch in range(3):
        visited = triples(order, np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(map(tuple, visited.tolist())) == everything


@given(STREAMS, SEEDS, st.data())
@settings(deadline=None)
def test_the_order_does_not_depend_on_how_it_is_asked_for(
    streams: list[list[int]], seed: int, data: st.DataObject
) -> None:
    weights = [float(w) for w in data.draw(st.permutations(range(1, len(streams) + 1)))]
    order = order_of(streams, weights, seed=seed)
    whole = triples(order, np.arange(200))
    asked = np.array(data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=50)))
    fresh = order_of(streams, weights, seed=seed)
    assert (triples(fresh, asked) == whole[asked]).all()
    one_by_one = [triples(fresh, asked[i : i + 1])[0] for i in range(len(asked))]
    assert (np.array(one_by_one) == whole[asked]).all()


@pytest.mark.parametrize("size", [*range(1, 66), 100, 255, 256, 257, 1000, 4096, 4097])
def test_a_shuffle_is_a_bijection(size: int) -> None:
    for seed in range(3):
        index = np.arange(size, dtype=np.uint64)
        moved = permute(index, np.full(size, size, np.uint64), np.repeat(mix(seed), size))
        assert sorted(moved.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 2**62])
def test_a_shuffle_of_a_large_range_stays_within_it_and_never_collides(size: int) -> None:
    n = 100_000
    index = np.concatenate([np.arange(n), size - 1 - np.arange(n)]).astype(np.uint64)
    moved = permute(index, np.full(2 * n, size, np.uint64), np.full(2 * n, 5, np.uint64))
    assert moved.max() < size
    assert len(np.unique(moved)) == 2 * n


def test_all_orders_of_three_samples_come_up_about_equally_often() -> None:
    keys = np.repeat(mix(np.arange(6000)), 3)
    moved = permute(
        np.tile(np.arange(3, dtype=np.uint64), 6000), np.full(18000, 3, np.uint64), keys
    )
    _, counts = np.unique(moved.reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 850
    assert counts.max() < 1150


def test_seeds_epochs_and_streams_each_have_an_order_of_their_own() -> None:
    n = 1000
    positions = np.arange(n)
    orders = [
        triples(order_of([[100] * 10], seed=seed), positions + epoch * n)
        for seed in (0, 1, 2**62)
        for epoch in (0, 1)
    ]
    both = triples(order_of([[100] * 10] * 2, seed=0), np.arange(2 * n))
    orders += [both[both[:, 0] == stream] for stream in (0, 1)][1:]
    flat = [order[:, 1] * 100 + order[:, 2] for order in orders]
    for i, one in enumerate(flat):
        for other in flat[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15  # 1/sqrt(1000) is 0.03
            assert (one == other).mean() < 0.01


def test_place_in_the_order_says_nothing_about_place_in_the_files() -> None:
    n = 20_000
    at = order_of([[2_000] * 10]).locate(np.arange(n, dtype=np.int64))
    file_place = at.shard * 2_000 + at.row
    assert abs(np.corrcoef(np.arange(n), file_place)[0, 1]) < 0.03
    assert abs(np.corrcoef(file_place[:-1], file_place[1:])[0, 1]) < 0.03


def test_a_reader_needs_only_a_window_of_shards_at_a_time() -> None:
    order = order_of([[100] * 200])
    at = order.locate(np.arange(20_000, dtype=np.int64))
    for start in range(0, 20_000, 100 * WINDOW_SHARDS):
        window = at.shard[start : start + 100 * WINDOW_SHARDS]
        assert len(np.unique(window)) <= WINDOW_SHARDS


def test_unshuffled_is_file_order() -> None:
    at = order_of([[3, 0, 2]], shuffle=False).locate(np.arange(7, dtype=np.int64))
    assert at.shard.tolist() == [0, 0, 0, 2, 2, 0, 0]
    assert at.row.tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    """If this fails, resumed runs would see other samples: restore the order, or say so loudly."""
    order = order_of([[5, 9, 4] * 7, [1000]], [3.0, 1.0], seed=17)
    seen = triples(order, np.array([0, 1, 2, 3, 4, 5, 1000, 1001, 10**10, 10**12]))
    assert seen.tolist() == [
        [1, 0, 229],
        [0, 7, 3],
        [0, 16, 6],
        [0, 0, 0],
        [1, 0, 670],
        [0, 10, 3],
        [1, 0, 235],
        [0, 8, 3],
        [1, 0, 301],
        [1, 0, 671],
    ]


@given(st.integers(0, 1000), st.integers(1, 50))
@settings(deadline=None)
def test_slices_of_ranks_partition_any_number_of_samples(n: int, world_size: int) -> None:
    parts = [range(n)[rank_slice(n, rank, world_size)] for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(n))
