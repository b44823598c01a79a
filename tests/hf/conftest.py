"""A small model with no option at its default, its weights as in a checkpoint, a tokenizer."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpt.checkpoint.weights import Weights, gather, pieces_in
from mpt.model.network import MPT
from mpt.recipe.model import Model
from mpt.tokenizer import train_tokenizer

MakeWeights = Callable[[Model], Weights]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text("utf-8") for file in sorted(folder.glob("*.py"))[:40]]
    train_tokenizer(texts, path, vocab_size=1024)
    return path


@pytest.fixture(scope="session")
def model() -> Model:
    return Model(
        d_model=48,
        n_heads=6,  # not a power of two: the slopes are picked from those of 8 heads
        n_layers=2,
        max_seq_len=96,
        vocab_size=1100,  # more than the tokenizer has
        clip_qkv=1.5,
        softmax_scale=0.3,
        emb_pdrop=0.1,
        resid_pdrop=0.2,
        attn_pdrop=0.3,
    )


@pytest.fixture(scope="session")
def make_weights(tmp_path_factory: pytest.TempPathFactory) -> MakeWeights:
    """Random weights, gains included: with gains of one, norms could be swapped unseen."""

    def make(model: Model) -> Weights:
        directory = tmp_path_factory.mktemp("checkpoint")
        path = directory / "weights.safetensors"
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 1.0)
            for name, tensor in MPT(model).state_dict().items()
        }
        save_file(tensors, path)
        return gather(directory, ((piece.key, piece) for piece in pieces_in(path)))

    return make


@pytest.fixture(scope="session")
def weights(make_weights: MakeWeights, model: Model) -> Weights:
    return make_weights(model)
