"""The nearest orthogonal matrix, nearly: Newton-Schulz iteration."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""Of the quintic a x + b x^3 + c x^5, which all singular values are taken through. They end within
about 0.7 to 1.2, not at 1, and so with few steps (Jordan et al. 2024)."""
EPS = 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return U V^T for each U S V^T, nearly: (k, n, m) -> (k, n, m), bf16 or fp32 as they are.

    Products and the norm are summed in fp32, whose range bf16 has too: entries may be of any size
    whose squares are in it. A matrix of zeros stays one, and one with a NaN becomes all NaN.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    # A spectral norm of at most 1, for which Frobenius' is a bound.
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / norm.clamp(min=EPS)).to(matrices.dtype)
    for _ in range(STEPS):
        gram = x @ x.mT  # (k, n, n), the smaller of both
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
