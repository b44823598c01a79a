"""ALiBi slopes: MPT's own, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from mpt.model.position import alibi_slopes


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 7, 8, 12, 16, 20, 32, 40, 56, 64, 112])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_slopes_are_those_of_the_reference_bit_for_bit(n_heads: int, bias_max: int) -> None:
    bias = build_mpt_alibi_tensor(n_heads, 2, alibi_bias_max=bias_max)  # (H, 1, 2)
    theirs = -bias[:, 0, 0]  # of two keys, the one a token back
    assert torch.equal(alibi_slopes(n_heads, bias_max), theirs)


def test_a_power_of_two_gives_the_papers_geometric_sequence() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_the_gentlest_slope_is_set_by_the_bias_maximum() -> None:
    for n_heads in (4, 6, 12, 40):
        slopes = alibi_slopes(n_heads, 8)
        assert float(slopes.min()) >= 2.0**-8
        assert len(set(slopes.tolist())) == n_heads
        assert all(0 < slope < 1 and math.isfinite(slope) for slope in slopes.tolist())
