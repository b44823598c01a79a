"""The host queues steps and does not wait for them: nothing of a step is read on its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpt.dist import Ranks
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer
from mpt.recipe.train import Optimizer
from mpt.state import IGNORE, Microbatch
from mpt.train.step import train_step
from tests.tiny_model import TINY, sharded
from tests.world import on_ranks

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
"""Operations whose result the host must have to go on: on a GPU each waits for all before it."""


class Reads(TorchDispatchMode):
    """Remembers the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def reads_of_two_steps(ranks: Ranks) -> list[str]:
    model = sharded(ranks)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3))
    generator = torch.Generator().manual_seed(ranks.rank)
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY.max_seq_len), generator=generator)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    cuts = [Microbatch(*cut) for cut in zip(tokens.split(2), targets.split(2), strict=True)]
    train_step(model, optimizer, cuts, next_token_loss, max_grad_norm=1.0)
    with Reads() as reads:
        for _ in range(2):
            result = train_step(model, optimizer, cuts, next_token_loss, max_grad_norm=1.0)
        on_its_way = list(reads.found)
        float(result.loss)
    assert reads.found[len(on_its_way) :] == ["_local_scalar_dense"], "reads are seen here"
    return on_its_way


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_reads_nothing_from_the_device(world_size: int) -> None:
    assert on_ranks(world_size, reads_of_two_steps) == [[]] * world_size
