"""Laws of the training step, on real process groups."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.data.targets import documents_of
from mpt.data.order import rank_slice
from mpt.dist import Ranks
from mpt.model.network import MPT
from mpt.objective import Objective, next_token_loss
from mpt.optim import build_optimizer, set_learning_rate, training_tensors
from mpt.recipe.plain import model_from
from mpt.recipe.train import Optimizer
from mpt.state import IGNORE, Loss, Microbatch, StepResult
from mpt.train.step import train_step
from tests.tiny_model import TINY, digest, sharded, weights_of, whole
from tests.world import on_ranks

Taken = tuple[dict[str, Tensor], list[tuple[float, float]]]
"""Weights after some steps, and loss and gradient norm of each."""

BATCH = 12
ADAMW = Optimizer(lr=1e-2)
AS_SGD = Optimizer(lr=1e6, betas=(0.0, 0.0), eps=1e6, weight_decay=0.0)
"""Moves a weight by its gradient: nothing is divided by a small number."""


def global_batch() -> Microbatch:
    """Twelve samples, some nearly without targets: a mean of means would be wrong here."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TINY.vocab_size, (BATCH, TINY.max_seq_len), generator=generator)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    targets[0, :14] = IGNORE
    targets[7, 2:] = IGNORE
    return Microbatch(tokens, targets)


def share_of(ranks: Ranks, microbatch_size: int, eod_id: int | None = None) -> list[Microbatch]:
    """Cut this rank's rows of the global batch as the loader does: equal counts, padded."""
    batch = global_batch()
    mine = rank_slice(BATCH, ranks.rank, ranks.world_size)
    share = -(-BATCH // ranks.world_size)
    padded = -(-share // microbatch_size) * microbatch_size
    tokens = torch.zeros(padded, TINY.max_seq_len, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    n = len(batch.tokens[mine])
    tokens[:n], targets[:n] = batch.tokens[mine], batch.targets[mine]
    parts = [tokens, targets]
    if eod_id is not None:
        parts.append(torch.from_numpy(documents_of(tokens.numpy(), eod_id)))
    return [
        Microbatch(*cut)
        for cut in zip(*(part.split(microbatch_size) for part in parts), strict=True)
    ]


def after_steps(
    ranks: Ranks,
    microbatch_size: int,
    steps: int = 2,
    max_grad_norm: float = 1.0,
    reduce_each: bool = False,
) -> Taken:
    model = sharded(ranks)
    optimizer = build_optimizer(model, ADAMW)
    seen = []
    for _ in range(steps):
        result = train_step(
            model,
            optimizer,
            share_of(ranks, microbatch_size),
            next_token_loss,
            max_grad_norm=max_grad_norm,
            reduce_each=reduce_each,
        )
        seen.append((float(result.loss), float(result.grad_norm)))
    return weights_of(model), seen


RICH: dict[str, dict[str, Any]] = {
    "llama-shaped": {
        "alibi": False,
        "rope": True,
        "kv_n_heads": 2,
        "ffn_type": "mptglu",
        "act_fn": "silu",
        "norm_type": "rmsnorm",
        "tie_word_embeddings": False,
        "attn_uses_sequence_id": True,
    },
    "shared keys": {
        "n_layers": 3,
        "alibi": False,
        "learned_pos_emb": True,
        "no_bias": False,
        "qk_ln": True,
        "embedding_fraction": 0.5,
        "final_logit_softcapping": 5.0,
        "block_overrides": {
            "order": [{"name": "default"}, {"name": "same", "repeat": 2}],
            "overrides": {"same": {"reuse_kv_layer_idx": -1, "sliding_window_size": 3}},
        },
    },
}


def rich_steps(ranks: Ranks, name: str, microbatch_size: int) -> Taken:
    cfg = model_from(asdict(TINY) | RICH[name])
    model = sharded(ranks, cfg)
    optimizer = build_optimizer(model, AS_SGD)
    eod_id = 5 if cfg.attn_uses_sequence_id else None
    share = share_of(ranks, microbatch_size, eod_id)
    seen = []
    for _ in range(2):
        result = train_step(model, optimizer, share, next_token_loss, max_grad_norm=1.0)
        seen.append((float(result.loss), float(result.grad_norm)))
    return weights_of(model), seen


def begun_with(ranks: Ranks, name: str) -> dict[str, Tensor]:
    return weights_of(sharded(ranks, model_from(asdict(TINY) | RICH[name])))


@pytest.mark.parametrize("name", RICH)
def test_every_option_of_the_model_is_sharded_alike(name: str) -> None:
    (alone,) = on_ranks(1, rich_steps, name, BATCH)
    (begun,) = on_ranks(1, begun_with, name)
    still = [key for key, weight in alone[0].items() if torch.equal(weight, begun[key])]
    assert not still, "no gradient reaches these"
    for result in on_ranks(2, rich_steps, name, 2):
        assert_same(result, alone)


def assert_same(ours: Taken, theirs: Taken) -> None:
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    for name, weight in ours[0].items():
        torch.testing.assert_close(weight, theirs[0][name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def reference() -> Taken:
    (result,) = on_ranks(1, after_steps, BATCH)
    return cast(Taken, result)


@pytest.mark.parametrize("microbatch_size", [1, 3, 5])
def test_update_does_not_depend_on_how_the_batch_is_cut(
    reference: Taken, microbatch_size: int
) -> None:
    (cut,) = on_ranks(1, after_steps, microbatch_size)
    assert_same(cut, reference)


@pytest.mark.parametrize(("world_size", "reduce_each"), [(2, 1), (2, 0), (3, 0), (4, 0)])
def test_update_depends_neither_on_the_world_size_nor_on_when_gradients_are_reduced(
    reference: Taken, world_size: int, reduce_each: bool
) -> None:
    for result in on_ranks(world_size, after_steps, 2, 2, 1.0, reduce_each):
        assert_same(result, reference)


def test_a_world_size_that_does_not_divide_the_batch_changes_nothing(reference: Taken) -> None:
    for result in on_ranks(5, after_steps, 2):  # shares of 3, 3, 2, 2, 2
        assert_same(result, reference)


def plain_torch(ranks: Ranks) -> Taken:
    """The same two steps in lines anyone can check: no FSDP, no chunks, no fused anything."""
    weights = weights_of(sharded(ranks))
    model = MPT(TINY, "sdpa")
    model.load_state_dict(weights)
    batch = global_batch()
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    seen = []
    for _ in range(2):
        logits = model(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return {name: p.detach() for name, p in model.named_parameters()}, seen


def test_the_step_equals_plain_torch(reference: Taken) -> None:
    (plain,) = on_ranks(1, plain_torch)
    assert_same(reference, plain)


def test_clipping_limits_the_update_and_inf_turns_it_off() -> None:
    (clipped,) = on_ranks(1, one_sgd_step, 0.01)
    (free,) = on_ranks(1, one_sgd_step, math.inf)
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert free > 0.1


def one_sgd_step(ranks: Ranks, max_grad_norm: float) -> float:
    """Return how far the weights moved in one step at learning rate 1.

    With no memory and a huge eps, AdamW is SGD: lr * g / (|g| + eps) = g, as far as fp32 tells.
    """
    model = sharded(ranks)
    before = weights_of(model)
    optimizer = build_optimizer(model, AS_SGD)
    train_step(model, optimizer, share_of(ranks, 4), next_token_loss, max_grad_norm=max_grad_norm)
    return math.hypot(*(float((before[n] - w).norm()) for n, w in weights_of(model).items()))


Bad = tuple[StepResult, str, str, str, StepResult]
"""The bad step's result, digests before it, after it and after the next one, and that one's."""


def with_a_bad_step(ranks: Ranks, bad_rank: int, factor: float, loss_limit: float) -> Bad:
    model = sharded(ranks)
    optimizer = build_optimizer(model, ADAMW)
    set_learning_rate(optimizer, 1e-2)

    def spoiled(network: torch.nn.Module, microbatch: Microbatch) -> Loss:
        loss = next_token_loss(network, microbatch)
        times = factor if ranks.rank == bad_rank else 1.0
        return Loss(loss.objective * times, loss.nats * times)

    def take(objective: Objective) -> StepResult:
        return train_step(
            model,
            optimizer,
            share_of(ranks, 4),
            objective,
            max_grad_norm=1.0,
            loss_limit=loss_limit,
        )

    def state() -> str:
        return digest({n: whole(t) for n, t in training_tensors(model, optimizer).items()})

    take(next_token_loss)
    before = state()
    bad = take(spoiled)
    after = state()
    good = take(next_token_loss)
    return bad, before, after, state(), good


@pytest.mark.parametrize(("factor", "limit"), [(math.nan, math.inf), (math.inf, 9.0), (10.0, 9.0)])
def test_a_bad_step_on_one_rank_is_skipped_on_all_bit_for_bit(factor: float, limit: float) -> None:
    for bad, before, after, later, good in on_ranks(2, with_a_bad_step, 1, factor, limit):
        assert not bad.applied
        assert not bad.loss < 9.0, "one loss over all ranks"
        assert after == before, "weights, moments or step counts moved"
        assert good.applied
        assert later != after, "the next good step is taken as if nothing had been"


def first_step(ranks: Ranks, loss_limit: float) -> tuple[float, bool]:
    model = sharded(ranks)
    result = train_step(
        model,
        build_optimizer(model, ADAMW),
        share_of(ranks, 4),
        next_token_loss,
        max_grad_norm=1.0,
        loss_limit=loss_limit,
    )
    return float(result.loss), bool(result.applied)


def test_a_loss_above_its_limit_is_a_spike_and_one_at_it_is_none() -> None:
    ((loss, applied),) = on_ranks(1, first_step, math.inf)
    assert applied
    assert on_ranks(1, first_step, loss) == [(loss, True)]
    assert on_ranks(1, first_step, loss - 1e-5) == [(loss, False)]


def init_digest(ranks: Ranks, seed: int) -> str:
    return digest(weights_of(sharded(ranks, seed=seed)))


def test_initial_weights_do_not_depend_on_the_world_size_but_on_the_seed() -> None:
    (alone,) = on_ranks(1, init_digest, 3)
    assert on_ranks(3, init_digest, 3) == [alone] * 3
    assert on_ranks(4, init_digest, 3) == [alone] * 4
    assert on_ranks(1, init_digest, 4) != [alone]
