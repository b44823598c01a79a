"""Products in 8 bits, as far as a CPU can show them: rounded, but multiplied in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from mpt.dist import Ranks
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer
from mpt.recipe.float8 import Float8
from mpt.train.build import multiply_in_float8
from mpt.train.step import train_step
from tests.dist.test_step import ADAMW, share_of
from tests.tiny_model import TINY, digest, weights_of
from tests.world import on_ranks

pytest.importorskip("torchao", reason="is an extra: float8")


def trained(ranks: Ranks, how: Float8) -> tuple[str, set[str], list[float]]:
    """Return a digest of the first weights, the layers that round, and the losses of a few steps."""
    with torch.device("meta"):
        model = MPT(TINY, "blocks")
    if how != "off":
        multiply_in_float8(model.transformer.blocks, how, emulate=True)
    rounding = {n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    for part in (*model.transformer.blocks, model):
        fully_shard(part, mesh=ranks.mesh)
    model.to_empty(device=ranks.device)
    initialise(model, TINY, 3)
    begun = digest(weights_of(model))
    optimizer = build_optimizer(model, ADAMW)
    losses = []
    for _ in range(4):
        batch = share_of(ranks, 3)
        losses.append(
            float(train_step(model, optimizer, batch, next_token_loss, max_grad_norm=1.0).loss)
        )
    return begun, rounding, losses


@pytest.mark.parametrize("how", ["tensorwise", "rowwise"])
def test_blocks_multiply_in_8_bits_and_train_as_well_to_begin_with(how: Float8) -> None:
    begun, none, plain = on_ranks(2, trained, "off")[0]
    assert not none
    for first, rounding, losses in on_ranks(2, trained, how):
        assert first == begun, "weights are what they are without, under the same names"
        with torch.device("meta"):
            linear = {n for n, m in MPT(TINY).named_modules() if isinstance(m, nn.Linear)}
        assert rounding == linear
        assert losses != plain
        assert losses == pytest.approx(plain, abs=0.05)
