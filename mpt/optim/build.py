"""From a recipe to an optimizer over sharded parameters, and what of it is saved."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from mpt.optim.muon import Muon
from mpt.recipe.train import Optimizer


def build_optimizer(
    model: nn.Module, cfg: Optimizer, dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """Return the optimizer over the sharded parameters, its moments already there (zero).

    Matrices are decayed; one-dimensional tensors (norm gains) are not. Muon takes the matrices
    within blocks. Embeddings, whose rows are looked up one by one, and the head, whose rows are
    classes, stay with AdamW, as do all tensors of one dimension.

    Args:
        dtype: that training computes in, and Muon's products too. Weights and moments are fp32.
    """
    if cfg.name == "muon":
        return _muon(model, cfg, dtype)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        fused=True,
    )
    _make_moments(optimizer)
    return optimizer


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Take the optimizer's step, unless `bad` (a () bool tensor) holds.

    The flag is read on the device, so the host never waits for it. Where it is set, weights,
    moments and the optimizer's own step count stay as they are, bit for bit.
    """
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every tensor that a resumed run needs, by name, sharing memory with the run.

    Weights keep their own names; optimizer state is `optimizer.<kind>.<parameter>`.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {name: p.detach() for p, name in names.items()}
    for parameter, name in names.items():
        for kind, tensor in sorted(optimizer.state[parameter].items()):
            tensors[f"optimizer.{kind}.{name}"] = tensor
    return tensors


def _muon(model: nn.Module, cfg: Optimizer, dtype: torch.dtype) -> Muon:
    """Return Muon over the matrices of blocks, those of one shape together, and AdamW's rest."""
    alike: dict[tuple[torch.Size, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    others: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".blocks." in name:
            alike[parameter.shape, _pieces(model, name, parameter)].append(parameter)
        else:
            others[parameter.ndim >= 2].append(parameter)
    return Muon(
        [(pieces, parameters) for (_, pieces), parameters in alike.items()],
        decayed=others[True],
        undecayed=others[False],
        lr=cfg.lr,
        momentum=cfg.momentum,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        dtype=dtype,
    )


def _pieces(model: nn.Module, name: str, parameter: Tensor) -> tuple[int, ...]:
    """Return the rows of each matrix in a parameter: the fused Wqkv holds three, one on another.

    Queries, keys and values are apart: they are three maps, fused only to be computed at once.
    Orthogonalised together, one of them would get a smaller update because another has a larger.
    """
    attention, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind != "Wqkv":
        return (parameter.shape[0],)
    splits: list[int] = model.get_submodule(attention).splits  # type: ignore[assignment]
    return tuple(splits)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that torch makes lazily at the first step: a load needs somewhere to go."""
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)  # with which a step changes no weight
    optimizer.step()
    for parameter in parameters:
        for tensor in optimizer.state[parameter].values():
            tensor.zero_()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
