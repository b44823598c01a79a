"""Every way of computing attention gives what three plain lines of torch give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mpt.model.attend import Attend, attend_blocks, attend_sdpa
from mpt.model.position import alibi_slopes
from mpt.recipe.budget import QUERY_BLOCK

B, H, HEAD = 2, 3, 8
LENGTHS = [1, 5, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 3 * QUERY_BLOCK + 7]


def plain(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """Softmax of scaled scores minus slope times distance, later keys left out."""
    S = q.shape[2]
    distance = torch.arange(S)[:, None] - torch.arange(S)
    scores = q @ k.transpose(-2, -1) * scale - slopes[:, None, None] * distance
    return scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v


def inputs(S: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(S)
    drawn = torch.randn(3, B, H, S, HEAD, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = (t.clone().requires_grad_() for t in drawn)
    return q, k, v


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.double()


@pytest.mark.parametrize("attend", [attend_sdpa, attend_blocks])
@pytest.mark.parametrize("S", LENGTHS)
def test_outputs_and_gradients_equal_plain_torch(attend: Attend, S: int) -> None:
    ours, theirs = inputs(S, torch.float32), inputs(S)
    slopes, weight = alibi_slopes(H), torch.randn(B, H, S, HEAD, dtype=torch.float64)
    out = attend(*ours, slopes, 0.3, 0.0)
    expected = plain(*theirs, slopes.double(), 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient(mine), gradient(reference), rtol=1e-3, atol=1e-4)


def test_blocks_in_bf16_stay_within_bf16_of_the_truth() -> None:
    S = 2 * QUERY_BLOCK + 3
    ours, theirs = inputs(S, torch.bfloat16), inputs(S)
    attend_blocks(*ours, alibi_slopes(H), 0.3, 0.0).float().sum().backward()
    plain(*theirs, alibi_slopes(H).double(), 0.3).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        error = (gradient(mine) - gradient(reference)).norm() / gradient(reference).norm()
        assert error < 2e-2


@pytest.mark.parametrize("attend", [attend_sdpa, attend_blocks])
def test_a_later_token_changes_nothing_before_it(attend: Attend) -> None:
    S, changed = QUERY_BLOCK + 9, QUERY_BLOCK + 2
    q, k, v = (t.detach().float() for t in inputs(S))
    before = attend(q, k, v, alibi_slopes(H), 0.3, 0.0)
    k, v = k.clone(), v.clone()
    k[:, :, changed], v[:, :, changed] = 7.0, -7.0
    after = attend(q, k, v, alibi_slopes(H), 0.3, 0.0)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed:], after[:, :, changed:])


@pytest.mark.parametrize("attend", [attend_sdpa, attend_blocks])
def test_dropout_keeps_the_mean_and_follows_the_seed(attend: Attend) -> None:
    S = QUERY_BLOCK + 5
    q, k, v = (t.detach().float() for t in inputs(S))
    v = torch.ones_like(v)  # without dropout every output is then 1
    torch.manual_seed(1)
    first = attend(q, k, v, alibi_slopes(H), 0.3, 0.4)
    torch.manual_seed(1)
    again = attend(q, k, v, alibi_slopes(H), 0.3, 0.4)
    assert torch.equal(first, again)
    assert float(first.var()) > 0.01
    assert float(first.mean()) == pytest.approx(1.0, abs=0.05)
