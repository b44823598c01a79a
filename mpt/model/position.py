"""Where a token stands: the ALiBi slopes that make attention decay with distance."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(n_heads: int, bias_max: int = 8) -> Tensor:
    """Return the ALiBi slope of each head: how fast its attention decays with distance.

    Args:
        n_heads: number of attention heads H, at least 1.
        bias_max: the gentlest slope is 2**-bias_max.

    Returns:
        float32 (H,), dimensionless, each in (0, 1). A score at distance d tokens gets
        `-slope * d` added before softmax.

    Source:
        Press et al. 2022, arXiv:2108.12409, section 3. For H not a power of two, MPT takes
        every other slope of the next power of two H' (odd ranks first); we must match it
        bit for bit, because checkpoints store no slopes.
    """
    pow2 = 1 << (n_heads - 1).bit_length()
    # torch.pow, not exp2: exp2 differs from MPT's own slopes in the last bit at 40 heads.
    slopes = 1 / torch.pow(2, torch.arange(1, pow2 + 1, dtype=torch.float32) * (bias_max / pow2))
    if pow2 == n_heads:
        return slopes
    return torch.cat([slopes[1::2], slopes[0::2]])[:n_heads]
