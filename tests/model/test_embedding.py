"""Looking up embeddings: torch's values, and a gradient that adds up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mpt.model.embedding import look_up


def test_values_and_gradients_equal_torch() -> None:
    weight = torch.randn(11, 4, requires_grad=True)
    same = weight.detach().clone().requires_grad_()
    tokens, d_out = torch.randint(0, 11, (3, 7)), torch.randn(3, 7, 4)
    out = look_up(tokens, weight)
    assert torch.equal(out, F.embedding(tokens, same))
    out.backward(d_out)
    F.embedding(tokens, same).backward(d_out)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, same.grad)


def test_a_frequent_token_loses_nothing_to_bf16() -> None:
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(1, 4000, dtype=torch.int64)
    look_up(tokens, weight).backward(torch.ones(1, 4000, 1, dtype=torch.bfloat16))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[4000.0], [0.0]]
