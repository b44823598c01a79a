"""The chunked loss equals the plain one, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpt.model.head import LogitForm, chunk_cost, summed_loss
from mpt.recipe.budget import HEAD_ROWS
from mpt.state import IGNORE, Loss

D, V = 16, 61


def case(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(0, V, (1, rows), generator=generator)
    targets[:, ::3] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


FORMS = {
    "as it is": LogitForm(),
    "scaled": LogitForm(factor=0.3),
    "capped": LogitForm(factor=2.0, cap=5.0),
    "z-loss": LogitForm(z_loss=0.1),
    "all": LogitForm(factor=0.5, cap=3.0, z_loss=0.03),
}


def ours_of(case: tuple[Tensor, Tensor, Tensor], form: LogitForm = FORMS["as it is"]) -> Loss:
    return summed_loss(*case, form, chunk_cost)


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, form: LogitForm = FORMS["as it is"]
) -> tuple[Tensor, Tensor]:
    """The objective and its part that is nats."""
    logits = form.factor * (hidden @ weight.T).flatten(0, 1)
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    taken = logits[targets.flatten() != IGNORE]
    return nats + form.z_loss * (taken.exp().sum(-1).log() ** 2).sum(), nats


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("rows", [2, HEAD_ROWS - 1, HEAD_ROWS, HEAD_ROWS + 1, 1100])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_equal_the_plain_ones(rows: int, form: str) -> None:
    ours, theirs = case(rows), case(rows)
    loss, (expected, nats) = ours_of(ours, FORMS[form]), plain(*theirs, FORMS[form])
    torch.testing.assert_close(loss.objective, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.nats, nats, rtol=1e-5, atol=1e-4)
    assert not loss.nats.requires_grad, "what is reported is not what is minimised"
    (loss.objective * 0.37).backward()
    (expected * 0.37).backward()
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(gradient(mine), gradient(reference), rtol=1e-4, atol=1e-4)


def test_bf16_gradients_add_up_over_many_chunks() -> None:
    rows = 16 * HEAD_ROWS
    ours, exact = case(rows, torch.bfloat16), case(rows, torch.bfloat16)
    ours_of(ours).objective.backward()
    hidden, weight = (t.detach().double().requires_grad_() for t in exact[:2])
    plain(hidden, weight, exact[2])[0].backward()
    error = (gradient(ours[1]).double() - gradient(weight)).norm() / gradient(weight).norm()
    assert error < 5e-3


def test_no_target_no_loss_no_gradient() -> None:
    hidden, weight, targets = case(10)
    loss = ours_of((hidden, weight, torch.full_like(targets, IGNORE)), FORMS["all"]).objective
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
        ours_of(case(rows)).objective.backward()
    assert seen.elements <= max(HEAD_ROWS * V, rows * D)


def test_evaluation_gives_the_same_loss_as_training() -> None:
    with torch.no_grad():
        evaluated = ours_of(case(700))
    assert torch.equal(evaluated.nats, ours_of(case(700)).nats)


@pytest.mark.parametrize("form", ["as it is", "all"])
def test_a_compiler_takes_the_cost_of_a_chunk_in_whole(form: str) -> None:
    compiled = torch.compile(chunk_cost, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, theirs = case(50, torch.bfloat16), case(50, torch.bfloat16)
    summed_loss(*ours, FORMS[form], compiled).objective.backward()
    ours_of(theirs, FORMS[form]).objective.backward()
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(gradient(mine), gradient(reference))


def test_what_a_sure_prediction_is_still_off_by_is_not_lost_to_bf16() -> None:
    raw = torch.zeros(1, V, dtype=torch.bfloat16)
    raw[0, 7] = 11.0  # a probability of 0.999: in bf16 it would be 1
    found = chunk_cost(raw, torch.tensor([7]), LogitForm(), wanted=True).d_raw
    assert found is not None
    exact = torch.softmax(raw.double(), dim=-1)[0, 7] - 1
    assert -2e-3 < float(exact) < -5e-4
    assert float(found[0, 7]) == pytest.approx(float(exact), rel=1e-2)
