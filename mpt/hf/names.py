"""The tensors of a model: their names and shapes here, and what they are called elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mpt.checkpoint.weights import Shape
from mpt.errors import CheckpointError
from mpt.model.network import MPT
from mpt.recipe.model import Model

Architecture = Literal["mpt", "llama"]
"""What transformers itself can run of ours, by its `model_type`."""

_MOST_SHOWN = 10

_LLAMA = {
    "transformer.wte": "model.embed_tokens",
    "transformer.norm_f": "model.norm",
    "lm_head": "lm_head",
}
_LLAMA_BLOCK = {
    "norm_1": "input_layernorm",
    "attn.out_proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}


class Part(NamedTuple):
    """Rows of one of our tensors: what a tensor elsewhere is."""

    name: str
    start: int
    shape: Shape
    """Of the part; its first number is how many rows it has."""

    @property
    def rows(self) -> tuple[int, int]:
        return (self.start, self.start + self.shape[0])


def shapes_of(model: Model) -> dict[str, Shape]:
    """Return the names and shapes of a model's tensors, without any memory for them.

    Raises:
        CheckpointError: if no tensor could be as large.
    """
    try:
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in MPT(model).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        raise CheckpointError(f"model: no tensor can be of such a size: {error}") from error


def names_there(model: Model, architecture: Architecture) -> dict[str, Part]:
    """Return what each tensor in transformers' model is, in terms of ours."""
    ours = shapes_of(model)
    if architecture == "mpt":
        return {name: Part(name, 0, shape) for name, shape in ours.items()}
    found: dict[str, Part] = {}
    for name, shape in ours.items():
        module, _, kind = name.rpartition(".")
        if module in _LLAMA:
            found[f"{_LLAMA[module]}.{kind}"] = Part(name, 0, shape)
            continue
        _, _, number, inner = module.split(".", 3)
        block = f"model.layers.{number}"
        if inner != "attn.Wqkv":
            found[f"{block}.{_LLAMA_BLOCK[inner]}.{kind}"] = Part(name, 0, shape)
            continue
        start = 0
        widths = {"q": model.q_width, "k": model.kv_width, "v": model.kv_width}
        for letter, width in widths.items():
            there = f"{block}.self_attn.{letter}_proj.{kind}"
            found[there] = Part(name, start, (width, *shape[1:]))
            start += width
    return found


def check_tensors(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: Path) -> None:
    """Make sure that tensors are those of a model, by name and shape.

    Raises:
        CheckpointError: names the tensors that are missing, not known, or of another shape.
    """
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not the model's" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    if wrong:
        shown = sorted(wrong)[:_MOST_SHOWN]
        if more := len(wrong) - len(shown):
            shown.append(f"and {more} more")
        raise CheckpointError(f"{where}: not the weights of this model: {'; '.join(shown)}.")


def check_depth(n_tensors: int, model: Model, where: Path) -> None:
    """Refuse a model of more layers than there are tensors, before a network of it is built.

    Raises:
        CheckpointError: if there are fewer tensors than layers.
    """
    if model.n_layers > n_tensors:
        raise CheckpointError(f"{where}: has fewer tensors than the model has layers.")
