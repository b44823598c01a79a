"""Laws of reading with a cache: the logits are those of a network that reads everything anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mpt.errors import CheckpointError
from mpt.generate import read
from mpt.generate.read import read_anew, read_on
from mpt.model.network import MPT
from tests.generate.networks import CONTEXT, OPTIONS, small

LENGTHS = (13, 1, 7, 13)


def anew(network: MPT, texts: list[list[int]]) -> Tensor:  # (B, V)
    """What follows each text, read alone and whole."""
    with torch.inference_mode():
        return torch.cat([network(torch.tensor([text]))[:, -1] for text in texts])


@pytest.mark.parametrize("at_once", [5, 512])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_changes_no_logits_whatever_else_is_in_the_batch(
    monkeypatch: pytest.MonkeyPatch, name: str, at_once: int
) -> None:
    monkeypatch.setattr(read, "_AT_ONCE", at_once)
    network = small(**OPTIONS[name])
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(80, (len(LENGTHS), CONTEXT), generator=drawn).tolist()
    texts = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    cache, logits = read_anew(network, texts, capacity=CONTEXT)
    torch.testing.assert_close(logits, anew(network, texts), atol=2e-5, rtol=1e-5)
    for _ in range(CONTEXT - max(LENGTHS)):
        texts = [row[: len(text) + 1] for row, text in zip(ids, texts, strict=True)]
        logits = read_on(network, [text[-1] for text in texts], cache)
        torch.testing.assert_close(logits, anew(network, texts), atol=2e-5, rtol=1e-5)
    assert logits.std() > 0.5  # else equal logits would prove little


def test_texts_can_be_dropped_and_the_others_go_on() -> None:
    network = small()
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    cache, _ = read_anew(network, texts, capacity=8)
    cache.keep([0, 2])
    logits = read_on(network, [11, 12], cache)
    expected = anew(network, [[1, 2, 3, 4, 11], [7, 8, 9, 12]])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_equal_texts_are_read_once_and_then_go_apart() -> None:
    network = small()
    shapes: list[tuple[int, ...]] = []
    network.transformer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    cache, _ = read_anew(network, [[1, 2], [3, 4, 5], [1, 2]], capacity=8)
    logits = read_on(network, [6, 7, 8], cache)
    assert shapes == [(2, 3), (3, 1)]
    expected = anew(network, [[1, 2, 6], [3, 4, 5, 7], [1, 2, 8]])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dropped", ["resid_pdrop", "attn_pdrop", "emb_pdrop"])
def test_reading_uses_no_dropout_and_leaves_the_mode_as_it_was(dropped: str) -> None:
    changed: dict[str, Any] = {dropped: 0.9}
    network = small(**changed).train()
    _, logits = read_anew(network, [[1, 2, 3]], capacity=3)
    assert all(module.training for module in network.modules())
    torch.testing.assert_close(logits, anew(network.eval(), [[1, 2, 3]]), atol=2e-5, rtol=1e-5)


def test_logits_of_a_bf16_network_are_those_it_has_without_a_cache() -> None:
    network = small().to(torch.bfloat16)
    cache, _ = read_anew(network, [[1, 2, 3]], capacity=4)
    logits = read_on(network, [4], cache)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, anew(network, [[1, 2, 3, 4]]).float(), atol=0.1, rtol=0.02)


def test_a_model_that_is_not_finite_is_refused() -> None:
    network = small()
    network.lm_head.weight.data[7, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        read_anew(network, [[0]], capacity=1)
