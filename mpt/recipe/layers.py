"""The `model.block_overrides:` section: blocks that differ from the others, in MPT's spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mpt.recipe.problem import Problem

DEFAULT = "default"

_MOST = 10_000
"""Blocks that an order may spell out: more is a slip, and would fill memory first."""


@dataclass(frozen=True)
class Layer:
    """What is particular to one block."""

    window: int | None = None
    """Tokens before itself that a token sees; None: all."""
    kv_from: int | None = None
    """The block whose keys and values it reads; None: it makes its own."""


@dataclass(frozen=True, kw_only=True)
class Override:
    sliding_window_size: int | None = None
    """In place of the model's; -1: no window."""
    reuse_kv_layer_idx: int | None = None
    """Take keys and values from the block so many before this one: -1 is the one before."""


@dataclass(frozen=True, kw_only=True)
class Order:
    name: str | None = None
    """`default`, or a name below `overrides`."""
    order: tuple[Order, ...] | None = None
    """Or a pattern of such entries."""
    repeat: int = 1
    """How often in a row."""

    def names(self) -> Iterator[str]:
        """Yield the kind of each block that this entry spells out."""
        for _ in range(self.repeat):
            if self.name is not None:
                yield self.name
            for entry in self.order or ():
                yield from entry.names()

    def problems(self, path: str) -> Iterator[Problem]:
        """Yield what is wrong with this entry, which lies at `path`."""
        # An order of nothing would be walked through as often as it repeats.
        if (self.name is None) == (not self.order):
            yield Problem(path, "needs either a name or an order of its own.")
        if self.repeat < 1:
            yield Problem(f"{path}.repeat", f"{self.repeat} is not a positive count.")
        for number, entry in enumerate(self.order or ()):
            yield from entry.problems(f"{path}.order[{number}]")

    @property
    def n_blocks(self) -> int:
        """Blocks that this entry spells out."""
        below = sum(entry.n_blocks for entry in self.order or ())
        return max(0, self.repeat) * (below + (self.name is not None))


@dataclass(frozen=True, kw_only=True)
class BlockOverrides:
    order: tuple[Order, ...]
    """Which kind each block is, from the first to the last."""
    overrides: dict[str, Override] = field(default_factory=dict)
    """What each kind changes; `default` changes nothing."""

    def layers(self, window: int | None) -> tuple[Layer, ...]:
        """Return each block's particulars, in their order, where the model's window is `window`."""
        kinds: Mapping[str, Override] = {DEFAULT: Override(), **self.overrides}
        layers: list[Layer] = []
        for index, name in enumerate(self._names()):
            kind, source = kinds[name], None
            if kind.reuse_kv_layer_idx is not None:
                source = index + kind.reuse_kv_layer_idx
                # Of a block that itself borrows: what it borrows.
                source = source if (lender := layers[source].kv_from) is None else lender
            size = kind.sliding_window_size
            own = window if size is None else None if size == -1 else size
            layers.append(Layer(own, source))
        return tuple(layers)

    def problems(self, n_layers: int) -> Iterator[Problem]:
        """Yield what is wrong with this section in a model of `n_layers`."""
        key = "model.block_overrides"
        wrong = [p for i, o in enumerate(self.order) for p in o.problems(f"{key}.order[{i}]")]
        yield from wrong
        if DEFAULT in self.overrides:
            yield Problem(f"{key}.overrides.{DEFAULT}", "is the name of blocks as they are.")
        if wrong:
            return
        n_blocks = sum(entry.n_blocks for entry in self.order)
        if n_blocks != n_layers or n_blocks > _MOST:
            yield Problem(
                f"{key}.order", f"spells out {n_blocks} blocks, and n_layers is {n_layers}."
            )
            return
        for index, name in enumerate(self._names()):
            if name != DEFAULT and name not in self.overrides:
                yield Problem(
                    f"{key}.order",
                    f"block {index} is {name!r}, which overrides do not have.",
                    f"they have {', '.join([DEFAULT, *self.overrides])}.",
                )
                return
        yield from self._bad_overrides(key)

    def _bad_overrides(self, key: str) -> Iterator[Problem]:
        names = list(self._names())
        for name, kind in self.overrides.items():
            size, back = kind.sliding_window_size, kind.reuse_kv_layer_idx
            if size is not None and size != -1 and size < 1:
                yield Problem(
                    f"{key}.overrides.{name}.sliding_window_size",
                    f"{size} is no window; -1 is off.",
                )
            if back is None:
                continue
            path = f"{key}.overrides.{name}.reuse_kv_layer_idx"
            if back >= 0:
                yield Problem(path, f"{back} is not negative; -1 is the block before.")
            elif name in names and names.index(name) + back < 0:
                yield Problem(path, f"block {names.index(name)} has no block {-back} before it.")

    def _names(self) -> Iterator[str]:
        for entry in self.order:
            yield from entry.names()
