"""What a microbatch leaves in memory: the arithmetic against what a forward pass keeps."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpt.model.attend import Backend
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.recipe.budget import (
    HEAD_ROWS,
    Precision,
    Recompute,
    activation_bytes,
    auto_microbatch_size,
)
from mpt.recipe.model import Model
from tests.recipe.test_recipe_budget import mpt

GIB = 1 << 30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLES = 3
SMALL = Model(d_model=64, n_heads=4, n_layers=1, max_seq_len=256, vocab_size=16)


class Made(TorchDispatchMode):
    """Remembers every tensor that an operation gives, as long as somebody else keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        out = operation(*args, **(kw or {}))
        self._tensors += [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out

    def kept(self) -> dict[int, int]:
        """Return the bytes of each piece of memory that is still in use."""
        found = [tensor for ref in self._tensors if (tensor := ref()) is not None]
        memory = [tensor.untyped_storage() for tensor in found]
        return {piece.data_ptr(): piece.nbytes() for piece in memory}


def kept_bytes(
    model: Model, precision: Precision, attention: Backend, recompute: Recompute = "none"
) -> int:
    """Return the bytes that one more block keeps from the forward pass, without its weights."""

    def whole(n_layers: int) -> int:
        cfg = replace(model, n_layers=n_layers)
        network = MPT(cfg, attention, recompute=recompute)
        initialise(network, cfg, seed=0)
        network.to(DTYPES[precision])
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        tokens = torch.zeros(SAMPLES, cfg.max_seq_len, dtype=torch.int64)
        documents = tokens + 1 if cfg.attn_uses_sequence_id else None
        with Made() as made:
            loss = network(tokens, tokens, documents)
        kept: int = sum(n for at, n in made.kept().items() if at not in weights)
        del loss  # which is what keeps it all
        return kept

    return whole(3) - whole(2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("blocks", {}),
        ("blocks", {"ffn_type": "mptglu"}),
        ("blocks", {"act_fn": "relu"}),
        ("blocks", {"act_fn": "silu", "ffn_type": "mptglu", "ffn_hidden_size": 100}),
        ("blocks", {"act_fn": "tanh", "ffn_type": "mptglu"}),
        ("blocks", {"clip_qkv": 6.0}),
        ("blocks", {"resid_pdrop": 0.1}),
        ("blocks", {"head_dim": 32}),
        ("blocks", {"attn_pdrop": 0.1}),
        ("blocks", {"attn_logit_softcapping": 5.0}),
        ("blocks", {"attn_logit_softcapping": 5.0, "attn_pdrop": 0.1}),
        ("blocks", {"sliding_window_size": 1}),
        ("wide", {}),
        ("wide", {"head_dim": 28, "clip_qkv": 6.0}),
        ("wide", {"kv_n_heads": 1}),
        ("wide", {"sliding_window_size": 20}),
        ("wide", {"alibi": False}),
        ("sdpa", {}),
        ("sdpa", {"kv_n_heads": 1}),
        ("sdpa", {"clip_qkv": 6.0, "kv_n_heads": 2}),
        ("sdpa", {"qk_ln": True}),
        ("sdpa", {"alibi": False}),
        ("sdpa", {"alibi": False, "sliding_window_size": 20}),
        ("sdpa", {"sliding_window_size": 20}),
        ("sdpa", {"attn_uses_sequence_id": True}),
        ("sdpa", {"alibi": False, "attn_uses_sequence_id": True}),
        ("sdpa", {"attn_logit_softcapping": 5.0}),
        ("sdpa", {"attn_logit_softcapping": 5.0, "attn_pdrop": 0.1}),
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(
    attention: Backend, options: dict[str, Any], precision: Precision
) -> None:
    assert more_with_a_block(replace(SMALL, **options), precision, attention) == pytest.approx(
        kept_bytes(replace(SMALL, **options), precision, attention),
        rel=0.04,  # what is not in the estimate: a number a row, of norms and of softmax
    )


def more_with_a_block(
    model: Model, precision: Precision, attention: Backend, recompute: Recompute = "none"
) -> int:
    three, two = (
        activation_bytes(replace(model, n_layers=n), SAMPLES, precision, attention, recompute)
        for n in (3, 2)
    )
    return three - two


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["blocks", "wide", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ffn_type": "mptglu"}, {"kv_n_heads": 1}, {"attn_logit_softcapping": 9.0}],
    ids=str,
)
def test_what_is_made_again_is_not_kept(
    recompute: Recompute, attention: Backend, options: dict[str, Any]
) -> None:
    model = replace(SMALL, **options)
    kept = kept_bytes(model, "bf16", attention, recompute)
    assert more_with_a_block(model, "bf16", attention, recompute) == pytest.approx(kept, rel=0.04)
    # In the backward pass one block has all that it would have kept.
    one = {
        how: activation_bytes(replace(model, n_layers=1), SAMPLES, "bf16", attention, how)
        for how in ("none", recompute)
    }
    assert one["none"] == one[recompute]


def test_fused_attention_keeps_nothing_of_pairs() -> None:
    near, far = (replace(mpt("1b"), max_seq_len=s, n_layers=2) for s in (2048, 65_536))
    for by in ("flex", "flash"):
        assert activation_bytes(far, 1, "bf16", by) < 32 * activation_bytes(near, 1, "bf16", by)
    for n_samples in (1, 7):  # the bias of two blocks, whatever the microbatch
        sdpa, flex = (activation_bytes(far, n_samples, "bf16", by) for by in ("sdpa", "flex"))
        assert sdpa - flex == 2 * 2 * 16 * 65_536**2


def test_the_head_is_charged_for_a_chunk_and_never_for_all_logits() -> None:
    model = replace(mpt("125m"), n_layers=1)
    assert activation_bytes(model, 64, "bf16") < 64 * 2048 * 50_432 * 4


def test_activations_grow_with_the_microbatch_and_the_width_of_a_number() -> None:
    model = mpt("1b")
    sizes = [activation_bytes(model, size, "bf16") for size in (1, 2, 3, 4, 8)]
    assert sizes == sorted(set(sizes))
    per_sample = sizes[1] - sizes[0]
    assert sizes[3] - sizes[2] == per_sample  # only the head's part does not grow
    assert sizes[0] - per_sample == 50_432 * (HEAD_ROWS * (4 + 4 + 2) + 4 * 2048)
    fp32 = activation_bytes(model, 1, "fp32")
    assert sizes[0] < fp32 < 2 * sizes[0]


@pytest.mark.parametrize("share", [1, 2, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("budget_bytes", [0, GIB, 10 * GIB, 70 * GIB, 10**18])
def test_auto_takes_the_fewest_microbatches_that_fit(share: int, budget_bytes: int) -> None:
    model = mpt("1b")
    size = auto_microbatch_size(model, share=share, budget_bytes=budget_bytes, precision="bf16")
    n_microbatches = -(-share // size)
    assert 1 <= size <= share
    assert size == 1 or activation_bytes(model, size, "bf16") <= budget_bytes
    if n_microbatches > 1:
        fewer = -(-share // (n_microbatches - 1))
        assert activation_bytes(model, fewer, "bf16") > budget_bytes
    assert n_microbatches * size - share < n_microbatches, "no sample of padding too many"
