"""Keys and values of what a network has read already, so that the next token costs one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpt.recipe.model import Model

PADDING = -1
"""The document of what stands before a shorter prompt of a batch: nobody looks at it."""


class Cache:
    """Room for a fixed number of tokens of each sample of a batch, filled from the left."""

    def __init__(
        self, cfg: Model, n_samples: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (n_samples, cfg.n_kv_heads, capacity, cfg.head_width)
        self.length = 0  # tokens that every layer holds
        self.capacity = capacity
        self._several = False  # documents, or padding
        self._documents = torch.zeros(n_samples, capacity, dtype=torch.int64, device=device)

        def room() -> tuple[Tensor, Tensor]:
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            return keys, values

        # A layer that reads another's keys and values has none of its own.
        self._layers = [room() if layer.kv_from is None else None for layer in cfg.layers]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these samples only, in this order; one may be named several times."""
        index = torch.tensor(rows, device=self._documents.device)
        self._documents = self._documents[index]
        self._layers = [kept and (kept[0][index], kept[1][index]) for kept in self._layers]

    def see(self, documents: Tensor | None, n_new: int) -> Tensor | None:
        """Note the documents (B, S) of the next tokens; return those of all, (B, length + S)."""
        stop = self.length + n_new
        assert stop <= self.capacity
        if documents is not None:
            self._documents[:, self.length : stop] = documents
            self._several = True
        return self._documents[:, :stop] if self._several else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values (B, n_kv, S, head_width); return those of all tokens."""
        kept = self._layers[layer]
        assert kept is not None
        stop = self.length + k.shape[2]
        for whole, new in zip(kept, (k, v), strict=True):
            whole[:, :, self.length : stop] = new
        return kept[0][:, :, :stop], kept[1][:, :, :stop]

    def advance(self, n_new: int) -> None:
        """Count tokens that all layers have appended."""
        self.length += n_new
