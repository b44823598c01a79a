"""Laws of shorter samples at first: the same tokens, every target, a function of the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt.data.targets import documents_of
from mpt.dist import Ranks
from mpt.launch.pulse import Phase
from mpt.model.network import MPT
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer
from mpt.recipe import Recipe
from mpt.recipe.data import Data, Stream
from mpt.recipe.train import Optimizer, SeqWarmup
from mpt.state import IGNORE, BadSample, Microbatch
from mpt.train.step import train_step
from tests.data.cases import write_dataset
from tests.data.test_data_loader import LENGTH, MODEL, loader_for
from tests.dist.running import DONE, STOPPED, assert_one_pass, final, prepared, run
from tests.dist.test_step import share_of
from tests.tiny_model import TINY, sharded, weights_of
from tests.world import on_ranks


@pytest.mark.parametrize(("start", "steps"), [(64, 200), (1, 9), (128, 1), (32, 10_000)])
def test_lengths_double_in_equal_parts_up_to_the_whole(start: int, steps: int) -> None:
    warmup = SeqWarmup(start=start, steps=steps)
    lengths = [warmup.length(step, 256) for step in range(steps + 5)]
    assert lengths == sorted(lengths)
    assert lengths[0] == start
    assert lengths[steps:] == [256] * 5
    counts = [lengths[:steps].count(start << i) for i in range((256 // start).bit_length() - 1)]
    assert sum(counts) == steps
    assert max(counts) - min(counts) <= 1


def test_a_cut_keeps_tokens_targets_and_documents_in_order() -> None:
    tokens = torch.arange(2 * 16).view(2, 16)
    targets = tokens + 1
    targets[:, -1] = IGNORE
    apart = torch.from_numpy(documents_of(tokens.numpy() % 5, 0))
    bad = (BadSample("c4", "shard", 1, "not a token"),)
    pieces = Microbatch(tokens, targets, apart, bad).cut(4)
    assert pieces.skipped == bad
    assert pieces.tokens.shape == (8, 4)
    assert torch.equal(pieces.tokens.flatten(), tokens.flatten())
    assert torch.equal(pieces.targets.flatten(), targets.flatten())
    assert pieces.documents is not None
    assert torch.equal(pieces.documents.flatten(), apart.flatten())


def test_what_a_loader_gives_is_cut_alike(tmp_path: Path) -> None:
    samples = np.arange(6 * LENGTH).reshape(6, LENGTH) % MODEL.vocab_size
    write_dataset(tmp_path / "set", samples)
    data = Data(streams={"only": Stream(path=str(tmp_path / "set"))})
    with loader_for(data, global_batch_size=4, microbatch_size=4) as loader:
        (whole,) = loader.next(0)
    pieces = whole.cut(LENGTH // 2)
    assert pieces.tokens.shape == (8, LENGTH // 2)
    assert torch.equal(pieces.tokens.flatten(), whole.tokens.flatten())
    assert torch.equal(pieces.targets.flatten(), whole.targets.flatten())


def of_pieces(ranks: Ranks, length: int) -> tuple[dict[str, Tensor], float]:
    model = sharded(ranks)
    optimizer = build_optimizer(model, Optimizer(lr=1e-2))
    share = [microbatch.cut(length) for microbatch in share_of(ranks, 3)]
    result = train_step(model, optimizer, share, next_token_loss, max_grad_norm=1.0)
    return weights_of(model), float(result.loss)


def plainly(ranks: Ranks, length: int) -> float:
    """Return the loss of pieces given one by one to a network that knows no longer ones."""
    model = MPT(replace(TINY, max_seq_len=length), "sdpa")
    model.load_state_dict(weights_of(sharded(ranks)))
    (batch,) = share_of(ranks, 12)
    nats, n = 0.0, 0
    for i in range(len(batch.tokens)):
        for at in range(0, TINY.max_seq_len, length):
            piece = slice(at, at + length)
            here = Microbatch(batch.tokens[i : i + 1, piece], batch.targets[i : i + 1, piece])
            nats += float(next_token_loss(model, here).nats)
            n += int((here.targets != IGNORE).sum())
    return nats / n


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_on_pieces_is_one_on_short_samples_at_any_world_size(world_size: int) -> None:
    (wanted,) = on_ranks(1, plainly, 4)
    ((weights, _),) = on_ranks(1, of_pieces, 4)
    for theirs, loss in on_ranks(world_size, of_pieces, 4):
        assert loss == pytest.approx(wanted, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def with_everything(root: Path) -> Recipe:
    """Return a run under Muon with samples of 4, then 8, then 16 tokens."""
    cfg = prepared(root)
    return replace(
        cfg,
        train=replace(cfg.train, seq_warmup=SeqWarmup(start=4, steps=10)),
        optimizer=Optimizer(name="muon", lr=1e-2),
    )


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    cfg = with_everything(tmp_path)
    assert run(cfg, tmp_path / "whole", nproc=2) == [DONE]
    stops = [(Phase.STEP, 3), (Phase.STEP, 7), (Phase.STEP, 12)]  # one within each length
    ends = run(cfg, tmp_path / "stopped", nproc=2, stops=stops)
    assert ends == [STOPPED] * 3 + [DONE]
    assert final(tmp_path / "stopped") == final(tmp_path / "whole")
    assert_one_pass(tmp_path / "stopped")

    uncut = replace(cfg, train=replace(cfg.train, seq_warmup=None))
    assert run(uncut, tmp_path / "uncut", nproc=2) == [DONE]
    assert final(tmp_path / "uncut")[0] != final(tmp_path / "whole")[0], "samples were cut"
    assert final(tmp_path / "uncut")[1].tokens == final(tmp_path / "whole")[1].tokens
