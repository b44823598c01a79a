"""FlexAttention: its masks are torch's own, and what it computes on a CPU is the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._pytree import tree_map_only

from mpt.model.attend import Scores, attend_with, block_masks
from mpt.model.flex import BLOCK
from mpt.model.network import MPT
from mpt.model.position import alibi_slopes
from mpt.recipe.model import Model
from tests.model.attention import EACH, SCALE, H, Options, inputs, packed, plain
from tests.model.test_attend import BLOCKS

CPU = torch.device("cpu")
flex = attend_with("flex")


def mask(
    n_queries: int, n_keys: int, window: int | None = None, documents: Tensor | None = None
) -> BlockMask:
    start = n_keys - n_queries
    return block_masks("flex", documents, start, n_keys, {window}, CPU)[window]


def tiles(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return which tiles of (queries, keys) are seen in part and which in whole."""

    def dense(n_listed: Tensor | None, listed: Tensor | None) -> Tensor:
        assert n_listed is not None
        assert listed is not None
        out = torch.zeros_like(listed, dtype=torch.bool)
        taken = torch.arange(listed.shape[-1]) < n_listed[..., None]
        return out.scatter(-1, listed.long(), taken)

    return (
        dense(mask.kv_num_blocks, mask.kv_indices),
        dense(mask.full_kv_num_blocks, mask.full_kv_indices),
    )


def of_torch(
    n_queries: int, n_keys: int, window: int | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the same as torch finds it, by looking at each pair of tokens."""

    def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + (n_keys - n_queries) - key
        out = (distance >= 0) & (distance <= (n_keys if window is None else window))
        if documents is not None:
            own = documents[sample, query + (n_keys - n_queries)]
            out = out & (own == documents[sample, key])
        return out

    n_samples = None if documents is None else documents.shape[0]
    return tiles(create_block_mask(seen, n_samples, None, n_queries, n_keys, "cpu"))


@pytest.mark.parametrize(
    "window", [None, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 2, 2 * BLOCK - 1, 5000]
)
@pytest.mark.parametrize(
    ("n_queries", "n_keys"),
    [(5, 5), (BLOCK, BLOCK), (4 * BLOCK, 4 * BLOCK), (400, 400), (130, 400), (2 * BLOCK, 333)],
)
def test_tiles_are_those_that_torch_finds(n_queries: int, n_keys: int, window: int | None) -> None:
    ours, theirs = tiles(mask(n_queries, n_keys, window)), of_torch(n_queries, n_keys, window)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(700, 700), (512, 512), (450, 700)])
@pytest.mark.parametrize("order", [1, -1])
def test_tiles_of_packed_documents_are_those_that_torch_finds(
    n_queries: int, n_keys: int, order: int
) -> None:
    documents = order * (packed(n_keys) // 8)  # some are longer than a tile
    ours = tiles(mask(n_queries, n_keys, documents=documents))
    theirs = of_torch(n_queries, n_keys, documents=documents)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)
    assert theirs[1].any() or n_queries < n_keys
    assert not (theirs[0] | theirs[1]).all(), "some tiles show nothing"


@pytest.mark.parametrize("window", [None, 150])
def test_documents_in_any_order_lose_no_tile(window: int | None) -> None:
    n_keys = 700
    documents = packed(n_keys) // 4 * 7 % 5
    part, whole = tiles(mask(n_keys, n_keys, window, documents))
    their_part, their_whole = of_torch(n_keys, n_keys, window, documents)
    assert not (part & whole).any()
    assert ((part | whole) >= (their_part | their_whole)).all()
    assert (whole <= their_whole).all()


@pytest.mark.parametrize(
    ("options", "S", "T"),
    [
        (EACH["alibi"], 200, 200),
        (EACH["nothing"], 5, 5),
        (EACH["grouped"], 130, 300),
        (EACH["narrow window"], 2 * BLOCK, 2 * BLOCK),
        (EACH["documents"], 200, 200),
        (EACH["all"], 300, 300),
        (EACH["all"], 40, 300),
        (EACH["all but alibi"], 300, 300),
        (EACH["all"], 1, 300),
    ],
)
def test_outputs_equal_plain_torch(options: Options, S: int, T: int) -> None:
    q, k, v = (t.detach() for t in inputs(S, T, options.n_kv, torch.float32))
    scores = options.scores(T)
    masks = block_masks("flex", scores.documents, T - S, T, {options.window}, CPU)
    ours = flex(q, k, v, scores._replace(mask=masks.get(options.window)))
    expected = plain(q.double(), k.double(), v.double(), scores)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_network_does_with_flex_what_it_does_without() -> None:
    torch.manual_seed(0)
    reference, ours = MPT(BLOCKS, "sdpa"), MPT(BLOCKS, "flex")
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(reference.state_dict())
    S = BLOCKS.max_seq_len
    tokens, documents = torch.randint(0, BLOCKS.vocab_size, (2, S)), packed(S)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens, documents=documents), reference(tokens, documents=documents)
        )


def test_masks_without_documents_are_made_once_and_may_be_trained_with() -> None:
    with torch.inference_mode():
        first = mask(77, 77, 5)
    assert mask(77, 77, 5) is first
    assert mask(77, 77, 6) is not first
    assert not first.kv_indices.is_inference()
    assert mask(1 + BLOCK, 1 + BLOCK, documents=packed(1 + BLOCK)) is not mask(
        1 + BLOCK, 1 + BLOCK, documents=packed(1 + BLOCK)
    )


def test_a_mask_comes_through_being_taken_apart_and_put_together() -> None:
    """FSDP does that to what a block is given."""
    documents = packed(300)
    before = mask(300, 300, 40, documents)
    after = tree_map_only(Tensor, Tensor.clone, before)
    sample, head, query, key = torch.meshgrid(
        torch.arange(2), torch.arange(1), torch.arange(300), torch.arange(300), indexing="ij"
    )
    assert torch.equal(
        after.mask_mod(sample, head, query, key), before.mask_mod(sample, head, query, key)
    )
    assert torch.equal(after.kv_indices, before.kv_indices)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it does itself
def test_new_documents_and_another_window_need_no_new_kernel() -> None:
    counter = CompileCounter()
    attend: Callable[..., Any] = torch.compile(flex, backend=counter, fullgraph=True)
    q, k, v = (t.detach() for t in inputs(150, 150, H, torch.float32))
    for seed, window in [(1, 20), (2, 20), (3, 60), (4, 90)]:
        documents = packed(150).roll(seed, dims=1)
        scores = Scores(SCALE, alibi_slopes(H), 0.7, window, documents)
        ours = attend(q, k, v, scores._replace(mask=mask(150, 150, window, documents)))
        expected = plain(q.double(), k.double(), v.double(), scores)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_only_flex_asks_for_masks() -> None:
    model = Model(d_model=48, n_heads=6, n_layers=1, max_seq_len=8, vocab_size=32)
    for backend in ("sdpa", "blocks", "flash"):
        assert not block_masks(backend, None, 0, 8, {model.window}, CPU)
    assert not block_masks("flex", None, 7, 8, {None}, CPU), "a single query sees what it sees"
