"""How weights begin: a function of (seed, parameter name), whatever the world size.

| parameter                          | begins as                                            |
|------------------------------------|------------------------------------------------------|
| wte                                | normal, std sqrt(2 / d_model)                        |
| Wqkv, up_proj                      | normal, std sqrt(2 / fan_in)                         |
| out_proj, down_proj                | normal, std sqrt(2 / fan_in) / sqrt(2 n_layers)      |
| norm_1, norm_2, norm_f             | ones                                                 |

Source: MPT's `kaiming_normal_` with gain 0, fan_in and residual division, the released profile.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from mpt.dist import local_rows, local_tensor
from mpt.model.network import Attention
from mpt.model.position import alibi_slopes
from mpt.recipe.model import Model

ROW_BLOCK = 64
"""Rows drawn from one generator. A rank draws only the blocks that its own rows touch."""


def initialise(model: nn.Module, cfg: Model, seed: int) -> None:
    """Fill weights and buffers in place, sharded or not, after a build on the meta device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                _fill_normal(parameter, _std(name, parameter, cfg), f"{seed}:{name}")
        for module in model.modules():
            if isinstance(module, Attention):
                module.slopes.copy_(alibi_slopes(*module.alibi))


def _std(name: str, parameter: Tensor, cfg: Model) -> float:
    fan_in = parameter.shape[1]  # of a Linear (out, in) and of the embedding (V, D) alike
    residual = name.endswith(("out_proj.weight", "down_proj.weight"))
    return math.sqrt(2 / fan_in) / (math.sqrt(2 * cfg.n_layers) if residual else 1.0)


def _fill_normal(parameter: Tensor, std: float, key: str) -> None:
    """Draw this rank's rows of `parameter` as if the whole of it had been drawn."""
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
    for block in range(start // ROW_BLOCK, -(-stop // ROW_BLOCK)):
        digest = hashlib.blake2b(f"{key}:{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        drawn = torch.randn(ROW_BLOCK, parameter.shape[1], generator=generator) * std
        first, last = max(start, block * ROW_BLOCK), min(stop, (block + 1) * ROW_BLOCK)
        local[first - start : last - start] = drawn[
            first - block * ROW_BLOCK : last - block * ROW_BLOCK
        ]
