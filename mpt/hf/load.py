"""An exported directory as a model that runs here: config, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpt.errors import CheckpointError
from mpt.hf.config import model_from_config
from mpt.hf.tokenizer import MODEL_FILE
from mpt.model.network import MPT, Attention
from mpt.model.position import alibi_slopes
from mpt.recipe.model import Model
from mpt.storage import read_json
from mpt.tokenizer import Tokenizer, load_tokenizer

_CONFIG_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class LoadedExport:
    network: MPT
    """On the CPU, fp32, in evaluation mode."""
    model: Model
    tokenizer: Tokenizer


def is_exported(directory: Path) -> bool:
    """Tell an exported directory from a run or a checkpoint."""
    return (directory / "config.json").is_file()


def load_exported(directory: Path) -> LoadedExport:
    """Read what `export` wrote; transformers is not needed.

    Raises:
        CheckpointError: if config or weights are missing, damaged, or no model of ours.
        DataError: if there is no usable tokenizer.model.
    """
    path = directory / "config.json"
    config = read_json(path, limit_bytes=_CONFIG_LIMIT_BYTES, error=CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a mapping.")
    model = model_from_config(config)
    tokenizer = load_tokenizer(directory / MODEL_FILE)
    network = _network(directory, model)
    return LoadedExport(network, model, tokenizer)


def build_network(model: Model, read: Callable[[str], Tensor]) -> MPT:
    """Return a network in evaluation mode that holds the very tensors `read(name)` returns."""
    with torch.device("meta"):
        network = MPT(model)
    network.load_state_dict({name: read(name) for name in network.state_dict()}, assign=True)
    for module in network.modules():
        if isinstance(module, Attention):
            module.slopes = alibi_slopes(*module.alibi)  # in no checkpoint, so still on meta
    return network.eval()


def check_shapes(found: Mapping[str, tuple[int, ...]], model: Model, where: Path) -> None:
    """Make sure that tensors are those of a model, by name and shape.

    Raises:
        CheckpointError: names the tensors that are missing, not known, or of another shape.
    """
    if model.n_layers > len(found):  # before a network of that many layers is built
        raise CheckpointError(f"{where}: has fewer tensors than the model has layers.")
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in MPT(model).state_dict().items()}
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not the model's" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if tuple(found[name]) != wanted[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: not the weights of this model: {'; '.join(sorted(wrong))}."
        )


def _network(directory: Path, model: Model) -> MPT:
    # Which file holds a tensor is taken from the files, not from the index, whose names could
    # lead anywhere.
    homes: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(directory.glob("model*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                    if name in homes:
                        raise CheckpointError(f"{path}: {name} is also in {homes[name].name}.")
                    homes[name] = path
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        check_shapes(shapes, model, directory)

        def read(name: str) -> Tensor:
            with safe_open(str(homes[name]), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor.float()

        return build_network(model, read)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: weights cannot be read: {error}") from error
