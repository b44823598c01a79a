"""Which documents are kept: what workers found, put in the order of the source.

There is one table of duplicates for both sides of the split, and of documents that are alike the
first is kept, on whatever side it is. So no text of `train` has a duplicate in `eval`, exact or as
near as MinHash finds them, in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpt.data.batches import SPLITS, Batch, Split
from mpt.data.curate.duplicates import ExactTable, NearTable
from mpt.data.curate.judge import EDITS, Judged
from mpt.data.curate.rules import EXACT, NEAR, names_of
from mpt.data.curate.tally import Tally, bucket, count
from mpt.data.encode import Encoded
from mpt.recipe.curate import Curate


@dataclass
class Settler:
    """Sees every document once, in order, also those of a dataset that is finished."""

    settings: Curate
    names: list[str] = field(init=False)
    """Of the rules, as the bits of a verdict have them."""

    def __post_init__(self) -> None:
        near, limit = self.settings.near_duplicates, self.settings.limit_bytes
        self.names = names_of(self.settings)
        self._exact = ExactTable(limit) if self.settings.exact_duplicates else None
        self._near = NearTable(near.threshold, limit) if near else None

    @property
    def remembers(self) -> bool:
        """Whether a verdict hangs on the documents before."""
        return self._exact is not None or self._near is not None

    def settle(self, batch: Batch, judged: Judged, wanted: list[Split]) -> dict[Split, Encoded]:
        """Return what a batch adds to each dataset that wants it."""
        verdicts = self._with_duplicates(judged)
        token_kept = np.repeat(verdicts == 0, judged.n_tokens)
        token_side = np.repeat(judged.sides, judged.n_tokens)
        added: dict[Split, Encoded] = {}
        for split in wanted:
            side = SPLITS.index(split)
            mine = np.flatnonzero(judged.sides == side)
            tally = self._tally(batch, judged, verdicts, mine)
            tokens = judged.tokens[token_kept & (token_side == side)]
            added[split] = Encoded(tally.kept[0], tally.kept[1], tokens, tally)
        return added

    def _with_duplicates(self, judged: Judged) -> NDArray[np.uint64]:
        """Return the verdicts with what the tables say; what is kept goes into them."""
        verdicts = judged.verdicts.copy()
        if self._exact is None and self._near is None:
            return verdicts
        keys, bands = judged.keys.tolist(), judged.bands.tolist()
        for number in np.flatnonzero(verdicts == 0).tolist():
            if self._exact is not None and self._exact.has(keys[number]):
                verdicts[number] = self._bit(EXACT)
                continue
            if self._near is not None and judged.sketched[number]:
                if self._near.has(bands[number], judged.sketches[number]):
                    verdicts[number] = self._bit(NEAR)
                    continue
                self._near.add(bands[number], judged.sketches[number])
            if self._exact is not None:
                self._exact.add(keys[number])
        return verdicts

    def _bit(self, name: str) -> np.uint64:
        return np.uint64(1 << self.names.index(name))

    def _tally(
        self,
        batch: Batch,
        judged: Judged,
        verdicts: NDArray[np.uint64],
        mine: NDArray[np.int64],
    ) -> Tally:
        tally = Tally()
        sizes, n_tokens = judged.sizes.tolist(), judged.n_tokens.tolist()
        for number in mine.tolist():
            text, name = batch.texts[number], batch.names[number]
            came = len(text)
            tally.came[0] += 1
            tally.came[1] += came
            tally.before[bucket(came)] += 1
            broken = list(self._broken(int(verdicts[number])))
            for rule in broken:
                count(tally.broken, rule, 1, came)
            if broken:
                count(tally.dropped, broken[0], 1, came)
                tally.add_source(name, [1, came, 0, 0, 0])
                tally.add_example(broken[0], name, text)
                continue
            size, tokens = sizes[number], n_tokens[number]
            tally.kept = [a + b for a, b in zip(tally.kept, (1, size, tokens), strict=True)]
            tally.after[bucket(size)] += 1
            tally.add_source(name, [1, came, 1, size, tokens])
            for kind, changes in zip(EDITS, judged.edits[number].tolist(), strict=True):
                if changes:
                    count(tally.edits, kind, 1, changes)
        return tally

    def _broken(self, verdict: int) -> Iterator[str]:
        return (name for bit, name in enumerate(self.names) if verdict >> bit & 1)
