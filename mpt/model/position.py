"""Where a token stands: ALiBi's slopes, RoPE's rotations, places within documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpt.recipe.model import Model
from mpt.recipe.rope import RopeScaling


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


def rotations(cfg: Model, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of RoPE's angles at positions start to stop - 1.

    Returns:
        Two float32 (stop - start, head_width): the first half of a head's width is rotated
        against its second half, as in transformers.

    Source:
        Su et al. 2021, arXiv:2104.09864; scaling as in transformers' `modeling_rope_utils`.
    """
    speeds = _speeds(cfg, stop).to(device, non_blocking=True)  # (head_width / 2,) radians a token
    angles = torch.arange(start, stop, device=device).float()[:, None] * speeds
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads (B, H, S, head_width) by their positions, in fp32; the dtype stays."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def places(documents: Tensor) -> Tensor:
    """Return how far each token is into its document: (B, S) of document ids -> (B, S) int64."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _speeds(cfg: Model, n_tokens: int) -> Tensor:
    """Radians that each pair of dimensions turns from one token to the next."""
    scaling, theta, width = cfg.rope_hf_config, cfg.rope_theta, cfg.head_width
    if scaling.type == "dynamic" and n_tokens > cfg.max_seq_len:
        longer = scaling.factor * n_tokens / cfg.max_seq_len - (scaling.factor - 1)
        theta *= longer ** (width / (width - 2))
    speeds = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    match scaling.type:
        case "linear":
            return speeds / scaling.factor
        case "llama3":
            return _llama3(speeds, scaling)
        case _:
            return speeds


def _llama3(speeds: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow rotations divided by the factor, fast ones left alone, a ramp between.

    Source:
        Llama 3.1, as in transformers' `_compute_llama3_parameters`.
    """
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * speeds / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - fast) * speeds / scaling.factor + fast * speeds
