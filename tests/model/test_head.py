"""The chunked loss equals the plain one, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpt.model.head import summed_nats
from mpt.recipe.budget import HEAD_ROWS
from mpt.state import IGNORE

D, V = 16, 61


def case(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(0, V, (1, rows), generator=generator)
    targets[:, ::3] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("rows", [2, HEAD_ROWS - 1, HEAD_ROWS, HEAD_ROWS + 1, 1100])
def test_loss_and_gradients_equal_cross_entropy(rows: int) -> None:
    ours, theirs = case(rows), case(rows)
    loss, expected = summed_nats(*ours), plain(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(gradient(mine), gradient(reference), rtol=1e-4, atol=1e-4)


def test_bf16_gradients_add_up_over_many_chunks() -> None:
    rows = 16 * HEAD_ROWS
    ours, exact = case(rows, torch.bfloat16), case(rows, torch.bfloat16)
    summed_nats(*ours).backward()
    hidden, weight = (t.detach().double().requires_grad_() for t in exact[:2])
    plain(hidden, weight, exact[2]).backward()
    error = (gradient(ours[1]).double() - gradient(weight)).norm() / gradient(weight).norm()
    assert error < 5e-3


def test_no_target_no_loss_no_gradient() -> None:
    hidden, weight, targets = case(10)
    loss = summed_nats(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not gradient(hidden).any()
    assert not gradient(weight).any()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    rows = 8 * HEAD_ROWS
    with LargestTensor() as seen:
        summed_nats(*case(rows)).backward()
    assert seen.elements <= max(HEAD_ROWS * V, rows * D)


def test_evaluation_gives_the_same_loss_as_training() -> None:
    hidden, weight, targets = case(700)
    with torch.no_grad():
        assert torch.equal(summed_nats(hidden, weight, targets), summed_nats(*case(700)).detach())
