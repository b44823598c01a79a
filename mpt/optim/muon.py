"""Muon: the update of a matrix is its momentum, made orthogonal; AdamW for all that is none.

Source:
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the arithmetic is that of
    `torch.optim.Muon`, which knows nothing of sharded parameters.
    Scale of the update: Liu et al. 2025 (Moonlight), arXiv:2502.16982, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mpt.dist import local_rows, local_tensor
from mpt.optim.exchange import Exchange
from mpt.optim.orthogonal import orthogonalised

RMS = 0.2
"""Of the entries of an update at learning rate 1, which is about that of AdamW's. So a learning
rate and a weight decay that suit AdamW suit this too, and one of each serves all parameters."""

Matrices = tuple[tuple[int, ...], list[Tensor]]
"""Rows of each piece of a parameter, and the parameters, all of one shape, that are so made up."""


class Muon(torch.optim.Optimizer):
    """Muon over `matrices`, and AdamW over what else there is.

    A class, since a torch optimizer is one: its groups, state and hooks are what others look at.
    State: `momentum` of a matrix; AdamW's own of the rest.
    """

    found_inf: Tensor | None = None
    """() fp32 on the device; where it is not 0, a step changes nothing, bit for bit."""

    def __init__(
        self,
        matrices: Sequence[Matrices],
        *,
        decayed: list[Tensor],
        undecayed: list[Tensor],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        """Begin with moments of zero.

        Args:
            dtype: of what is exchanged and multiplied; bf16 is enough, where it is fast.
        """
        groups: list[dict[str, Any]] = [
            {"params": parameters, "pieces": pieces, "weight_decay": weight_decay}
            for pieces, parameters in matrices
        ]
        groups += [
            {"params": parameters, "pieces": None, "weight_decay": decay}
            for parameters, decay in ((decayed, weight_decay), (undecayed, 0.0))
            if parameters
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})
        self._dtype = dtype
        self._exchanges = []
        first = 0
        for group in self.param_groups:
            if group["pieces"] is None:
                self._make_adamw_state(group["params"])
                continue
            for parameter in group["params"]:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
            self._exchanges.append(Exchange.of(group["params"], first))
            first += len(group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that are there; every rank must call it."""
        exchanges = iter(self._exchanges)
        for group in self.param_groups:
            if group["pieces"] is None:
                self._step_adamw(group)
            else:
                self._step_matrices(group, next(exchanges))

    def _step_matrices(self, group: dict[str, Any], exchange: Exchange) -> None:
        parameters: list[Tensor] = group["params"]
        lr, momentum = float(group["lr"]), group["momentum"]
        weights = [local_tensor(p) for p in parameters]
        gradients = [local_tensor(_gradient(p)) for p in parameters]
        momenta = [local_tensor(self.state[p]["momentum"]) for p in parameters]

        new_momenta = torch._foreach_lerp(momenta, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, new_momenta, momentum)  # Nesterov's
        whole = exchange.to_owners(
            [rows.to(self._dtype) for rows in ahead]
        )  # (mine, rows, columns)
        # Each owner makes its own matrices orthogonal, piece by piece.
        pieces = whole.split(group["pieces"], dim=1)
        updates = exchange.to_holders(torch.cat([orthogonalised(p) for p in pieces], dim=1))

        scale = lr * _scales(parameters[0], group["pieces"])  # (rows here, 1)
        decay = 1 - lr * group["weight_decay"]
        bad = None if self.found_inf is None else self.found_inf > 0
        for weight, update in zip(weights, updates, strict=True):
            _assign(weight, (weight * decay).addcmul_(scale, update, value=-1), bad)
        for old, new in zip(momenta, new_momenta, strict=True):
            _assign(old, new, bad)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [_gradient(p) for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _make_adamw_state(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every parameter takes part in every step"
    return parameter.grad


def _assign(old: Tensor, new: Tensor, bad: Tensor | None) -> None:
    """Let `old` be `new`, unless that is bad; 0 * NaN is NaN, so there is a choice, no product."""
    if bad is None:
        old.copy_(new)
    else:
        torch.where(bad, old, new, out=old)


def _scales(parameter: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Return by what each row of an orthogonal update that lies on this rank is multiplied.

    An orthogonal matrix of n rows and m columns has entries of RMS 1 / sqrt(max(n, m)).
    """
    columns = parameter.shape[1]
    of_rows = [value for rows in pieces for value in [RMS * math.sqrt(max(rows, columns))] * rows]
    start, stop = local_rows(parameter)
    return torch.tensor(of_rows[start:stop]).to(parameter.device, non_blocking=True)[:, None]
