"""How weights begin: a function of (seed, parameter name), whatever the world size.

A matrix (fan_out, fan_in), embeddings and the head included, begins by `init_config.name` as

| scheme             | draws   | standard deviation                                         |
|--------------------|---------|------------------------------------------------------------|
| `default_`         | uniform | 1 / sqrt(3 fan_in), biases too; embeddings: normal, 1      |
| `baseline_`        | normal  | init_std                                                   |
| `small_init_`      | normal  | sqrt(2 / (5 d_model))                                      |
| `neox_init_`       | normal  | sqrt(2 / (5 d_model))                                      |
| `kaiming_normal_`  | normal  | gain(init_nonlinearity, init_gain) / sqrt(fan of fan_mode) |
| `kaiming_uniform_` | uniform | the same                                                   |
| `xavier_normal_`   | normal  | init_gain sqrt(2 / (fan_in + fan_out))                     |
| `xavier_uniform_`  | uniform | the same                                                   |

and, but for `default_`,

| parameter           | begins as                                                               |
|---------------------|-------------------------------------------------------------------------|
| wte, wpe            | normal, emb_init_std; or uniform, emb_init_uniform_lim; if one is given |
| Wqkv, Wq            | a matrix for each head: fan_out is head_width                           |
| out_proj, down_proj | divided by init_div_is_residual: true is sqrt(2 n_layers), with         |
|                     | `neox_init_` n_layers / sqrt(10); false is 1                            |
| biases              | zeros                                                                   |

Gains of norms begin as ones, their biases as zeros. The released profile is `kaiming_normal_` with
fan_in and relu: std sqrt(2 / fan_in).

Source: llm-foundry 0.22, `param_init_fns.py`.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpt.dist import local_rows, local_tensor
from mpt.recipe.init import Init
from mpt.recipe.model import Model

ROW_BLOCK = 64
"""Rows drawn from one generator. A rank draws only the blocks that its own rows touch."""


class Constant(NamedTuple):
    """All alike."""

    value: float


class Normal(NamedTuple):
    """Around zero."""

    std: float


class Uniform(NamedTuple):
    """In [low, high)."""

    low: float
    high: float


Beginning = Constant | Normal | Uniform


def initialise(model: nn.Module, cfg: Model, seed: int) -> None:
    """Fill weights in place, sharded or not, after a build on the meta device."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, beginning(name, shapes, cfg), f"{seed}:{name}")


def beginning(name: str, shapes: dict[str, torch.Size], cfg: Model) -> Beginning:
    """Return what the parameter `name` begins as, among parameters of these (whole) shapes."""
    *_, owner, kind = name.split(".")
    if owner.startswith("norm_") or owner in ("q_ln", "k_ln"):
        return Constant(1.0 if kind == "weight" else 0.0)
    init = cfg.init_config
    embedding = owner in ("wte", "wpe")
    if init.name == "default_":
        fan_in = shapes[name.removesuffix(kind) + "weight"][1]
        bound = 1 / math.sqrt(fan_in)
        return Normal(1.0) if embedding else Uniform(-bound, bound)
    if kind == "bias":
        return Constant(0.0)
    if embedding and init.emb_init_std is not None:
        return Normal(init.emb_init_std)
    if embedding and init.emb_init_uniform_lim is not None:
        lim = init.emb_init_uniform_lim
        return Uniform(*lim) if isinstance(lim, tuple) else Uniform(-lim, lim)
    fan_out, fan_in = shapes[name]
    if owner in ("Wqkv", "Wq"):
        fan_out = cfg.head_width
    divisor = _residual_divisor(cfg) if owner in ("out_proj", "down_proj") else 1.0
    std = _std(init, fan_in, fan_out, cfg.d_model) / divisor
    if init.name.endswith("uniform_"):
        bound = math.sqrt(3.0) * std  # a uniform draw in +-b has a standard deviation of b/sqrt(3)
        return Uniform(-bound, bound)
    return Normal(std)


def _std(init: Init, fan_in: int, fan_out: int, d_model: int) -> float:
    match init.name:
        case "kaiming_normal_" | "kaiming_uniform_":
            gain = nn.init.calculate_gain(init.init_nonlinearity, init.init_gain)
            return gain / math.sqrt(fan_in if init.fan_mode == "fan_in" else fan_out)
        case "xavier_normal_" | "xavier_uniform_":
            return init.init_gain * math.sqrt(2 / (fan_in + fan_out))
        case "small_init_" | "neox_init_":
            return math.sqrt(2 / (5 * d_model))
        case _:
            assert init.init_std is not None
            return init.init_std


def _residual_divisor(cfg: Model) -> float:
    """By how much a matrix is smaller that adds to the residual stream."""
    divisor = cfg.init_config.init_div_is_residual
    if not isinstance(divisor, bool):
        return divisor
    if not divisor:
        return 1.0
    if cfg.init_config.name == "neox_init_":
        return cfg.n_layers / math.sqrt(10)
    return math.sqrt(2 * cfg.n_layers)


def _fill(parameter: Tensor, begins: Beginning, key: str) -> None:
    """Draw this rank's rows of `parameter` as if the whole of it had been drawn."""
    if isinstance(begins, Constant):
        parameter.fill_(begins.value)
        return
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
    for block in range(start // ROW_BLOCK, -(-stop // ROW_BLOCK)):
        digest = hashlib.blake2b(f"{key}:{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        drawn = _draw(begins, (ROW_BLOCK, *parameter.shape[1:]), generator)
        first, last = max(start, block * ROW_BLOCK), min(stop, (block + 1) * ROW_BLOCK)
        local[first - start : last - start] = drawn[
            first - block * ROW_BLOCK : last - block * ROW_BLOCK
        ]


def _draw(begins: Normal | Uniform, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if isinstance(begins, Normal):
        return torch.randn(shape, generator=generator) * begins.std
    return torch.rand(shape, generator=generator) * (begins.high - begins.low) + begins.low
