"""Every way of computing attention gives what a few plain lines of torch give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mpt.model.attend import Attend, Scores
from mpt.model.blocks import attend_blocks
from mpt.model.network import MPT, Sight
from mpt.model.position import alibi_slopes
from mpt.model.sdpa import attend_sdpa
from mpt.model.wide import attend_wide
from mpt.recipe.budget import QUERY_BLOCK
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from tests.model.attention import EACH, SCALE, B, H, Options, gradients, inputs, packed, plain

LENGTHS = [1, 5, QUERY_BLOCK, 2 * QUERY_BLOCK + 7]
both = pytest.mark.parametrize("attend", [attend_sdpa, attend_blocks, attend_wide])
each = pytest.mark.parametrize("options", EACH.values(), ids=EACH.keys())


@both
@each
@pytest.mark.parametrize("S", LENGTHS)
def test_outputs_and_gradients_equal_plain_torch(attend: Attend, options: Options, S: int) -> None:
    q, k, v = inputs(S, S, options.n_kv, torch.float64)
    scores = options.scores(S)
    ours, theirs = attend(q, k, v, scores), plain(q, k, v, scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for mine, reference in zip(
        gradients(ours, (q, k, v)), gradients(theirs, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@both
@each
@pytest.mark.parametrize("n_new", [1, 3, QUERY_BLOCK + 2])
def test_queries_are_the_last_of_the_keys(attend: Attend, options: Options, n_new: int) -> None:
    T = 2 * QUERY_BLOCK + 9
    q, k, v = inputs(n_new, T, options.n_kv, torch.float64)
    scores = options.scores(T)
    ours, theirs = attend(q, k, v, scores), plain(q, k, v, scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for mine, reference in zip(
        gradients(ours, (q, k, v)), gradients(theirs, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@both
@each
def test_in_bf16_it_stays_within_bf16_of_the_truth(attend: Attend, options: Options) -> None:
    S = 2 * QUERY_BLOCK + 3
    q, k, v = inputs(S, S, options.n_kv, torch.bfloat16)
    exact_q, exact_k, exact_v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v, options.scores(S))
    assert out.dtype == torch.bfloat16
    expected = plain(exact_q, exact_k, exact_v, options.scores(S))
    truth = gradients(expected, (exact_q, exact_k, exact_v))
    for mine, reference in zip(gradients(out, (q, k, v)), truth, strict=True):
        assert float((mine - reference).norm() / reference.norm()) < 2e-2


@both
def test_a_later_token_changes_nothing_before_it(attend: Attend) -> None:
    S, changed = QUERY_BLOCK + 9, QUERY_BLOCK + 2
    q, k, v = (t.detach() for t in inputs(S, S, H, torch.float32))
    scores = Scores(SCALE, alibi_slopes(H))
    before = attend(q, k, v, scores)
    k, v = k.clone(), v.clone()
    k[:, :, changed], v[:, :, changed] = 7.0, -7.0
    after = attend(q, k, v, scores)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed:], after[:, :, changed:])


@both
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("S", [1, QUERY_BLOCK + 5])
def test_dropout_keeps_the_mean_and_follows_the_seed(
    attend: Attend, softcap: float | None, S: int
) -> None:
    T = QUERY_BLOCK + 5
    q, k, _ = (t.detach().float() for t in inputs(S, T, 2, torch.float32))
    v = torch.ones_like(k)  # without dropout every output is then 1
    scores = Scores(SCALE, None, softcap, dropout=0.4)
    torch.manual_seed(1)
    first = attend(q, k, v, scores)
    torch.manual_seed(1)
    again = attend(q, k, v, scores)
    assert torch.equal(first, again)
    assert float(first.var()) > 1e-3
    assert float(first.mean()) == pytest.approx(1.0, abs=0.05)


def test_blocks_skip_what_no_query_of_theirs_sees() -> None:
    n_blocks, window = 8, QUERY_BLOCK
    S = n_blocks * QUERY_BLOCK
    q, k, v = inputs(S, S, 2, torch.float32)

    def work(attend: Attend, window: int | None) -> int:
        with FlopCounterMode(display=False) as counter:
            attend(q, k, v, Scores(SCALE, window=window)).sum().backward()
        return int(counter.get_total_flops())

    # Forward 2 products and backward 4, each of all queries, all heads and some keys.
    per_key = 6 * 2 * q.numel()
    assert work(attend_blocks, None) == per_key * (S + QUERY_BLOCK) // 2
    pairs = QUERY_BLOCK * (QUERY_BLOCK + (n_blocks - 1) * (window + QUERY_BLOCK))
    assert work(attend_blocks, window) == per_key * pairs // S
    capped = Scores(SCALE, softcap=1.0, window=window)
    with FlopCounterMode(display=False) as counter:
        attend_blocks(q, k, v, capped)
    assert counter.get_total_flops() == per_key * pairs // S // 3


class LargestMade(TorchDispatchMode):
    """Notes the most numbers in a tensor that an operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_where_nothing_is_added_no_tensor_of_all_scores_is_made() -> None:
    S = 700
    q, k, v = (t.detach() for t in inputs(S, S, H, torch.float32))
    with LargestMade() as made:
        attend_sdpa(q, k, v, Scores(SCALE, window=S - 1))
    assert made.numbers == q.numel()
    with LargestMade() as made:
        attend_sdpa(q, k, v, Scores(SCALE, window=S - 2))
    assert made.numbers >= S * S


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_one_query_has_no_keys_copied_for_each_head(kernel: SDPBackend, alibi: bool) -> None:
    T = 500
    q, k, v = (t.detach() for t in inputs(1, T, 2, torch.float32, width=64))
    scores = Scores(SCALE, alibi_slopes(H) if alibi else None)
    with LargestMade() as made, sdpa_kernel(kernel):
        attend_sdpa(q, k, v, scores)
    # The plain kernel scales the keys as they are.
    assert made.numbers <= (k.numel() if kernel == SDPBackend.MATH else H * T)


BLOCKS = Model(
    d_model=48,
    n_heads=6,
    n_layers=2,
    max_seq_len=QUERY_BLOCK + 40,
    vocab_size=32,
    kv_n_heads=2,
    attn_uses_sequence_id=True,
    block_overrides=BlockOverrides(
        order=(Order(name="near"), Order(name="far")),
        overrides={
            "near": Override(sliding_window_size=9),
            "far": Override(sliding_window_size=QUERY_BLOCK + 5),
        },
    ),
)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it does itself
@pytest.mark.parametrize(
    ("backend", "n_blocks"),
    [("inductor", 1), ("aot_eager", 2)],  # the second block's window is another number
)
def test_a_compiled_block_does_what_an_eager_one_does(backend: str, n_blocks: int) -> None:
    torch.manual_seed(0)
    blocks = MPT(BLOCKS, "blocks").transformer.blocks[:n_blocks]
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    S = BLOCKS.max_seq_len
    sight = Sight(alibi_slopes(H), None, packed(S))

    def through(x: Tensor) -> tuple[Tensor, ...]:
        out = x
        for block in blocks:
            out, _ = block(out, sight)
        return (out.detach(), *gradients(out, (x, *blocks.parameters())))

    x = torch.randn(B, S, BLOCKS.d_model, requires_grad=True)
    eager = through(x)
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
    for compiled, expected in zip(through(x), eager, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
