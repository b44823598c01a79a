"""Whether matrix products in 8 bits can be had: of which hardware, package and widths."""

from __future__ import annotations

from typing import Literal

from mpt.recipe.activations import Precision
from mpt.recipe.machine import Machine
from mpt.recipe.model import Model
from mpt.recipe.size import kinds, qkv_widths

Float8 = Literal["off", "tensorwise", "rowwise"]

_TILE = 16
"""Both widths of a matrix must be a multiple of it for cuBLAS to multiply in 8 bits."""


def float8_obstacle(
    wanted: Float8, model: Model, machine: Machine, precision: Precision
) -> str | None:
    """Say why products in 8 bits cannot be had, as the rest of a sentence that they begin."""
    if wanted == "off":
        return None
    if machine.device == "cpu":
        return "runs on GPUs alone"
    if not machine.has_float8:
        return "needs a GPU of compute capability 8.9 (Ada) or later, which this one is not"
    if not machine.torchao_installed:
        return "needs the package torchao (`pip install 'mpt-train[float8]'`)"
    if precision != "bf16":
        return f"rounds what is in bf16, and the precision is {precision}"
    widths = {model.d_model, model.q_width, model.ffn_width}
    widths |= {sum(qkv_widths(model, layer)) for layer in kinds(model)}
    odd = sorted(width for width in widths if width % _TILE)
    if odd:
        return f"needs matrices whose widths are multiples of {_TILE}; {odd[0]} is not"
    return None
