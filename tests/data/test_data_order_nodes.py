"""Laws of who reads what: the same samples in the same steps for any ranks, near to each other."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data.ahead import Ahead, NodePart, shards_of
from mpt.data.mixture import Mixture, Phase
from mpt.data.order import WINDOW_SHARDS, Located, Order, share

WORLD_SIZES = (1, 2, 3, 4, 8)
Sample = tuple[int, int, int]
"""Stream, shard and row."""


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Small streams of shards of any size, under a curriculum, so that epochs end all the time."""
    sizes = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(sum)
    streams = draw(st.lists(sizes, min_size=1, max_size=3))
    weight = st.one_of(st.just(0.0), st.floats(0.1, 9.0))
    weights = st.lists(weight, min_size=len(streams), max_size=len(streams)).filter(any)
    phases = draw(st.lists(weights, min_size=1, max_size=3))
    starts = [0, *accumulate(draw(st.integers(1, 60)) for _ in phases)]
    mixture = Mixture(tuple(map(Phase, starts, map(tuple, phases))))
    arrays = [np.array(stream, np.int64) for stream in streams]
    return Order(arrays, mixture, draw(st.integers(0, 2**63 - 1)), draw(st.booleans()))


def located(order: Order, start: int, size: int) -> Located:
    return order.locate(np.arange(start, start + size, dtype=np.int64))


def samples(at: Located) -> list[Sample]:
    rows = np.stack([at.stream, at.shard, at.row], axis=1).tolist()
    return [(stream, shard, row) for stream, shard, row in rows]


@given(orders(), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_a_run_reads_the_same_samples_in_the_same_steps_however_often_its_world_changes(
    order: Order, batch_size: int, data: st.DataObject
) -> None:
    steps = 8
    wanted = samples(located(order, 0, steps * batch_size))
    for step in range(steps):  # each step on ranks of another number, each with an order of its own
        world_size = data.draw(st.sampled_from(WORLD_SIZES))
        again = Order(order.shard_sizes, order.mixture, order.seed, order.shuffle)
        batch = located(again, step * batch_size, batch_size)
        parts = [share(batch, range(r, r + 1), world_size) for r in range(world_size)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == -(-batch_size // world_size)
        together = np.sort(np.concatenate(parts))
        assert together.tolist() == list(range(batch_size))  # disjoint, and the whole
        found = samples(batch)
        assert [found[i] for i in together] == wanted[step * batch_size : (step + 1) * batch_size]


@given(orders())
@settings(deadline=None)
def test_every_stream_is_read_once_an_epoch_also_over_a_change_of_mixture(order: Order) -> None:
    seen: dict[int, list[Sample]] = {}
    for sample in samples(located(order, 0, 600)):
        seen.setdefault(sample[0], []).append(sample)
    for stream, in_order in seen.items():
        size = int(order.shard_sizes[stream].sum())
        for start in range(0, len(in_order), size):
            epoch = in_order[start : start + size]
            assert len(set(epoch)) == len(epoch)


def test_a_single_rank_reads_a_batch_in_the_order_of_its_positions() -> None:
    order = Order([np.full(40, 9)], Mixture.constant([1.0]), 17)
    assert share(located(order, 30, 64), range(1), 1).tolist() == list(range(64))


@given(orders(), st.integers(1, 40), st.integers(0, 300), st.sampled_from(WORLD_SIZES), st.data())
@settings(deadline=None)
def test_a_node_s_part_is_that_of_its_ranks(
    order: Order, batch_size: int, start: int, world_size: int, data: st.DataObject
) -> None:
    batch = located(order, start, batch_size)
    first = data.draw(st.integers(0, world_size - 1))
    ranks = range(first, data.draw(st.integers(first + 1, world_size)))
    alone = [share(batch, range(rank, rank + 1), world_size) for rank in ranks]
    assert share(batch, ranks, world_size).tolist() == np.sort(np.concatenate(alone)).tolist()
    node = NodePart(ranks, world_size)
    pairs = {samples(batch)[i][:2] for part in alone for i in part}
    assert set(shards_of(batch, node)) == pairs


@given(orders(), st.integers(1, 40), st.integers(0, 300))
@settings(deadline=None)
def test_places_follow_shards(order: Order, batch_size: int, start: int) -> None:
    """Within a window of a stream, the samples of a shard have places next to each other."""
    batch = located(order, start, batch_size)
    assert ((batch.place >= 0) & (batch.place < 1)).all()
    again = located(order, start, 1)
    windows = {here.stream: here for here, _ in order.windows_ahead(start)}
    window = windows[int(again.stream[0])]
    slot = window.shards.tolist().index(int(again.shard[0]))
    assert window.bounds[slot] <= again.place[0] < window.bounds[slot + 1]
    assert int(again.shard[0]) in window.between(again.place[0], np.nextafter(again.place[0], 2))


def test_the_windows_ahead_are_this_one_and_the_next_also_over_the_end_of_an_epoch() -> None:
    n = 3 * WINDOW_SHARDS
    order = Order([np.full(n, 5)], Mixture.constant([1.0]), 17)
    pairs = [order.windows_ahead(5 * WINDOW_SHARDS * number)[0] for number in range(4)]
    for (_, following), (here, _) in pairwise(pairs):
        assert here.shards.tolist() == following.shards.tolist()
    read = located(order, 0, 5 * WINDOW_SHARDS).shard
    assert sorted(pairs[0][0].shards.tolist()) == np.unique(read).tolist()
    assert sorted(np.concatenate([here.shards for here, _ in pairs[:3]]).tolist()) == list(range(n))


@pytest.mark.parametrize("n_nodes", [2, 4, 8, 16])
def test_a_node_reads_its_part_of_the_shards_and_what_it_reads_was_foreseen(n_nodes: int) -> None:
    """A batch of 1,024 and windows of 16 shards: 16/N and some 2 for where the cut wobbles."""
    batch_size, rows = 1024, 1000
    order = Order([np.full(64, rows)], Mixture.constant([1.0]), 3)
    batches_per_window = WINDOW_SHARDS * rows // batch_size
    for node in {0, n_nodes // 2, n_nodes - 1}:
        part = NodePart(range(4 * node, 4 * node + 4), 4 * n_nodes)
        touched: set[tuple[int, int]] = set()
        for number in range(batches_per_window):
            touched |= set(shards_of(located(order, number * batch_size, batch_size), part))
        assert len(touched) <= WINDOW_SHARDS / n_nodes + 3
        ((here, _),) = order.windows_ahead(0)
        foreseen = {(0, shard) for shard in here.between(*part.interval(batch_size))}
        assert touched <= foreseen
        assert len(foreseen) <= WINDOW_SHARDS / n_nodes + 5


def test_what_the_next_batches_need_is_wanted_first_then_this_window_then_the_next() -> None:
    order = Order([np.full(64, 100)], Mixture.constant([1.0]), 3)
    node = NodePart(range(1), 8)
    # Of eight samples a cut says little: what a batch needs may be far from the node's part.
    batches = [located(order, start, 8) for start in range(0, 400, 8)]
    ahead = Ahead([], order, node)
    wanted = list(dict.fromkeys(ahead._wanted(0, batches)))
    ahead.close()
    needed = list(dict.fromkeys(key for batch in batches for key in shards_of(batch, node)))
    assert len(needed) > 4
    assert wanted[: len(needed)] == needed
    ((here, following),) = order.windows_ahead(0)
    windows = [set(here.shards.tolist()), set(following.shards.tolist())]
    rest = [shard in windows[1] for _, shard in wanted[len(needed) :]]
    assert rest == sorted(rest)
    assert {shard for _, shard in wanted} <= windows[0] | windows[1]


def test_nodes_of_different_size_read_in_proportion() -> None:
    order = Order([np.full(64, 1000)], Mixture.constant([1.0]), 3)
    batch = located(order, 5000, 1000)
    small, large = share(batch, range(2), 10), share(batch, range(2, 10), 10)
    assert (len(small), len(large)) == (200, 800)
    assert batch.place[small].max() <= batch.place[large].min()
