"""On a GPU: every backend gives what plain torch gives in float64. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpt.model.attend import Backend, attend_with, block_masks
from mpt.model.network import MPT
from mpt.recipe.attention import flash_is_installed
from mpt.recipe.model import Model
from tests.model.attention import EACH, H, Options, gradients, inputs, packed, plain
from tests.model.test_attend import BLOCKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore"),  # torch.compile warns of what it does itself
]

GPU = torch.device("cuda")
WIDTH = 64
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Relative error that is never too much; beyond it, what counts is the reference's own error."""

each = pytest.mark.parametrize("options", EACH.values(), ids=EACH.keys())
lengths = pytest.mark.parametrize("S", [200, 2048])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
flash_only = pytest.mark.skipif(not flash_is_installed(), reason="flash-attn is not installed")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No kernel of another test: torch would make its constants into variables."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


class Outcome(NamedTuple):
    """An output and the gradients of q, k and v, in float64."""

    out: Tensor
    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


def outcome(
    backend: Backend | None, options: Options, S: int, T: int, dtype: torch.dtype
) -> Outcome:
    """Return what a backend computes from inputs rounded to `dtype`; None is plain float64."""
    drawn = inputs(S, T, options.n_kv, dtype, WIDTH, "cuda")
    exact = torch.float64 if backend is None else dtype
    q, k, v = (t.detach().to(exact).requires_grad_() for t in drawn)
    scores = options.scores(T, "cuda")
    if backend is None:
        out = plain(q, k, v, scores)
    else:
        masks = block_masks(backend, scores.documents, T - S, T, {options.window}, GPU)
        out = attend_with(backend)(q, k, v, scores._replace(mask=masks.get(options.window)))
        assert out.dtype == dtype
    return Outcome(out.detach().double(), *gradients(out, (q, k, v)))


def assert_as_near_as_the_reference(
    backend: Backend, options: Options, S: int, T: int, dtype: torch.dtype
) -> None:
    truth = outcome(None, options, S, T, dtype)
    reference = outcome("sdpa", options, S, T, dtype)
    ours = outcome(backend, options, S, T, dtype)
    for name, mine, theirs, exact in zip(Outcome._fields, ours, reference, truth, strict=True):
        error, usual = (float((t - exact).norm() / exact.norm()) for t in (mine, theirs))
        assert error <= max(2 * usual, CLOSE[dtype]), f"{name}: {error:.2e}, reference {usual:.2e}"


@each
@dtypes
@lengths
def test_the_reference_is_near_the_truth(options: Options, dtype: torch.dtype, S: int) -> None:
    truth, ours = (outcome(backend, options, S, S, dtype) for backend in (None, "sdpa"))
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    for name, mine, exact in zip(Outcome._fields, ours, truth, strict=True):
        assert float((mine - exact).norm() / exact.norm()) < allowed, name


@each
@dtypes
@lengths
def test_flex_is_as_near_as_the_reference(options: Options, dtype: torch.dtype, S: int) -> None:
    assert_as_near_as_the_reference("flex", options, S, S, dtype)


@each
@pytest.mark.parametrize("S", [1, 5, 130])
def test_flex_takes_queries_as_the_last_of_the_keys(options: Options, S: int) -> None:
    assert_as_near_as_the_reference("flex", options, S, 333, torch.float32)


@flash_only
@pytest.mark.parametrize("name", [name for name, options in EACH.items() if not options.documents])
@lengths
def test_flash_is_as_near_as_the_reference(name: str, S: int) -> None:
    assert_as_near_as_the_reference("flash", EACH[name], S, S, torch.bfloat16)


@flash_only
@pytest.mark.parametrize("S", [1, 5, 130])
def test_flash_takes_queries_as_the_last_of_the_keys(S: int) -> None:
    options = Options(n_kv=2, window=40, softcap=0.7)
    assert_as_near_as_the_reference("flash", options, S, 333, torch.bfloat16)


def network(backend: Backend, cfg: Model, *, compiled: bool) -> nn.Module:
    """Return a network whose weights do not depend on the backend."""
    torch.manual_seed(0)
    model = MPT(cfg, backend)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.to(GPU)
    if compiled:
        for block in model.transformer.blocks:
            block.compile(fullgraph=True)
    return model


def trained(model: nn.Module, cfg: Model, documents: Tensor | None) -> list[Tensor]:
    """Return the loss and the gradient of every weight."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, cfg.vocab_size, (2, cfg.max_seq_len), generator=generator).to(GPU)
    model.zero_grad()
    loss = model(tokens, tokens.roll(-1, dims=1), documents)
    loss.objective.backward()
    return [loss.nats, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 1
    for mine, expected in zip(ours, theirs, strict=True):
        assert float((mine - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("S", [200, 1024])
def test_a_network_with_flex_learns_what_it_learns_without(S: int, compiled: bool) -> None:
    cfg = replace(
        BLOCKS, d_model=H * 32, max_seq_len=S, attn_logit_softcapping=5.0, ffn_hidden_size=64
    )
    reference = network("sdpa", cfg, compiled=False)
    ours = network("flex", cfg, compiled=compiled)
    for roll in (0, 30, 60):  # other documents each time, as in training
        documents = packed(S).roll(roll, dims=1).to(GPU)
        assert_same(trained(ours, cfg, documents), trained(reference, cfg, documents))
    assert_same(trained(ours, cfg, None), trained(reference, cfg, None))


@flash_only
def test_a_compiled_network_takes_flash_in_whole() -> None:
    cfg = Model(d_model=H * 32, n_heads=H, n_layers=2, max_seq_len=200, vocab_size=64)
    reference = network("sdpa", cfg, compiled=False).bfloat16()
    ours = network("flash", cfg, compiled=True).bfloat16()
    for mine, expected in zip(trained(ours, cfg, None), trained(reference, cfg, None), strict=True):
        assert float((mine - expected).float().norm() / expected.float().norm()) < 5e-2


def test_masks_are_made_without_waiting_for_the_gpu() -> None:
    documents = packed(700).to(GPU)
    block_masks("flex", documents, 0, 700, {None, 100}, GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_masks("flex", documents, 0, 700, {None, 100}, GPU)
        block_masks("flex", None, 0, 701, {None, 100}, GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_long_mask_takes_no_memory_for_pairs_of_tokens() -> None:
    S = 65_536
    documents = packed(S).to(GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_masks("flex", documents, 0, S, {None}, GPU)
    assert torch.cuda.max_memory_allocated() - before < S * S // 100
