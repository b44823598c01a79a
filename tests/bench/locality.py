"""How many shards a node reads, and how well samples are shuffled, by nodes and size of window.

    python tests/bench/locality.py > tests/bench/locality.md

Nothing is read or timed: the figures are those of the order of samples itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpt.data import order as ordering
from mpt.data.mixture import Mixture
from mpt.data.order import Order

SHARDS = 256
ROWS = 16_368
"""Of a shard of 64 MiB: samples of 2,048 tokens, two bytes each."""
BATCH = 1024
SPAN = 1000
NODES = (1, 2, 4, 8, 16, 64)
WINDOWS = (16, 64)

Integers = NDArray[np.int64]


def main() -> None:
    print(
        f"# Shards a node reads, and how well samples are shuffled\n\n`python tests/bench/"
        f"locality.py` prints this page. An epoch of {SHARDS} shards of {ROWS:,} samples (64 MiB "
        f"at 2,048\ntokens), in batches of {BATCH:,}. `a -> b`: a where nodes take the batch in "
        "the order of its\npositions, b as it is, where they take it in the order of its shards."
    )
    for window in WINDOWS:
        ordering.WINDOW_SHARDS = window
        tables(window)


def tables(window: int) -> None:
    n = SHARDS * ROWS // BATCH * BATCH
    order = Order([np.full(SHARDS, ROWS)], Mixture.constant([1.0]), 17)
    parts = [order.locate(np.arange(k, k + BATCH)) for k in range(0, n, BATCH)]
    shard = np.stack([part.shard for part in parts])
    row = np.stack([part.row for part in parts])
    by_place = np.argsort(np.stack([part.place for part in parts]), axis=1, kind="stable")
    print(f"\n## Windows of {window} shards\n")
    print(
        "| nodes | shards a node fetches per 1,000 of its samples | copies of the dataset that all "
        "fetch | shards it has open over 1,000 samples |\n|---|---|---|---|"
    )
    for nodes in NODES:
        before = figures(shard, nodes)
        after = figures(np.take_along_axis(shard, by_place, axis=1), nodes)
        cells = (f"{a:.3g} -> {b:.3g}" for a, b in zip(before, after, strict=True))
        print(f"| {nodes} | {' | '.join(cells)} |")
    neighbours(shard, row)


def figures(shard: Integers, nodes: int) -> tuple[float, float, float]:
    """Return what is in a row of the table, for batches cut evenly in the order given.

    Args:
        shard: (steps, BATCH), the shard of each sample.
    """
    steps = len(shard)
    node = np.arange(BATCH) * nodes // BATCH
    fetched = len(np.unique(node * SHARDS + shard))
    spans = -(-SPAN * nodes // BATCH)  # steps in which a node takes so many samples
    touched = []
    for start in range(0, steps - spans, max(spans, steps // 64)):
        pairs = np.unique(node * SHARDS + shard[start : start + spans])
        touched.append(len(pairs) / nodes)
    return 1000 * fetched / shard.size, fetched / SHARDS, float(np.median(touched))


def neighbours(shard: Integers, row: Integers) -> None:
    """Print how far apart the steps of samples are that stand next to each other in a shard."""
    step = np.full((SHARDS, ROWS), -1, np.int64)
    step[shard, row] = np.arange(len(shard))[:, None]
    apart = np.abs(np.diff(step, axis=1))[(step[:, 1:] >= 0) & (step[:, :-1] >= 0)]
    fair = np.random.default_rng(0).integers(0, len(shard), (2, apart.size))
    whole = np.abs(fair[0] - fair[1])
    print("\n| neighbours in a shard | here | if the epoch were one window |\n|---|---|---|")
    print(f"| median steps apart | {np.median(apart):.0f} | {np.median(whole):.0f} |")
    print(f"| in the same step | {(apart == 0).mean():.2%} | {(whole == 0).mean():.2%} |")


if __name__ == "__main__":
    main()
