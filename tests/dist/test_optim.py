"""Laws of Muon, on real process groups: torch's own arithmetic, at any world size."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpt.dist import Ranks, local_rows
from mpt.optim import build_optimizer, set_learning_rate, step_unless, training_tensors
from mpt.optim.exchange import Exchange
from mpt.optim.orthogonal import orthogonalised
from mpt.recipe.plain import model_from
from mpt.recipe.train import Optimizer
from tests.dist.saving import digest_whole, load_newest, save_all
from tests.tiny_model import TINY, digest, sharded, weights_of, whole
from tests.world import on_ranks

MUON = Optimizer(name="muon", lr=1e-2, weight_decay=0.1)
GROUPED = model_from(asdict(TINY) | {"kv_n_heads": 2})
"""Keys and values are of fewer rows than queries: 32, 16 and 16."""

Steps = dict[str, Tensor]


def drawn(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return the gradient of a parameter in a step: the same whole tensor on any rank."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    # Of low rank and uneven spread, as gradients are.
    left = torch.randn(shape[0], 4, generator=generator)
    right = torch.randn(4, *shape[1:], generator=generator) if len(shape) > 1 else torch.ones(4)
    return (left @ right) * torch.rand(shape, generator=generator) * 1e-3


def give_gradients(model: nn.Module, step: int, factor: float = 1.0) -> None:
    for name, parameter in model.named_parameters():
        start, stop = local_rows(parameter)
        gradient = torch.zeros_like(parameter)
        gradient.to_local().copy_(drawn(name, parameter.shape, step)[start:stop] * factor)  # type: ignore[attr-defined]
        parameter.grad = gradient


def muon_steps(ranks: Ranks, cfg: Any = GROUPED, steps: int = 3) -> Steps:
    model = sharded(ranks, cfg)
    optimizer = build_optimizer(model, MUON)
    for step in range(steps):
        give_gradients(model, step)
        set_learning_rate(optimizer, MUON.lr / (1 + step))
        step_unless(optimizer, torch.tensor(False))
    return weights_of(model)


def torch_steps(ranks: Ranks, steps: int = 3) -> Steps:
    """The same by torch's own Muon and AdamW on plain tensors, with q, k and v as parameters."""
    weights = {name: nn.Parameter(w) for name, w in weights_of(sharded(ranks, GROUPED)).items()}
    splits = [GROUPED.q_width, GROUPED.kv_width, GROUPED.kv_width]
    apart: dict[str, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        rows = splits if name.endswith("Wqkv.weight") else [len(weight)]
        apart[name] = [nn.Parameter(piece.clone()) for piece in weight.detach().split(rows)]
    inner = [p for n, ps in apart.items() if ".blocks." in n for p in ps if p.ndim == 2]
    outer = [p for n, ps in apart.items() if ".blocks." not in n for p in ps if p.ndim == 2]
    flat = [p for ps in apart.values() for p in ps if p.ndim == 1]
    muon = torch.optim.Muon(inner, lr=MUON.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": outer, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}],
        betas=MUON.betas,
        eps=MUON.eps,
    )
    for step in range(steps):
        for name, pieces in apart.items():
            rows = [len(piece) for piece in pieces]
            gradient = drawn(name, weights[name].shape, step)
            for piece, part in zip(pieces, gradient.split(rows), strict=True):
                piece.grad = part.clone()
        for optimizer in (muon, adamw):
            set_learning_rate(optimizer, MUON.lr / (1 + step))
            optimizer.step()
    return {name: torch.cat(list(pieces)).detach() for name, pieces in apart.items()}


@pytest.fixture(scope="module")
def reference() -> Steps:
    (weights,) = on_ranks(1, torch_steps)
    found: Steps = weights
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_muon_is_that_of_torch_at_any_world_size(reference: Steps, world_size: int) -> None:
    (begun,) = on_ranks(1, muon_steps, GROUPED, 0)
    for weights in on_ranks(world_size, muon_steps):
        for name, weight in weights.items():
            moved = float((reference[name] - begun[name]).norm())
            off = float((weight - reference[name]).norm())
            # In bf16: torch rounds the norm as well, and sums may be taken in another order.
            assert off < (3e-2 if ".blocks." in name else 1e-5) * moved, (name, off / moved)


def as_adamw_moves(ranks: Ranks) -> list[tuple[str, float]]:
    """Return the RMS of the first update of each matrix in a block, over the learning rate."""
    model = sharded(ranks)
    before = weights_of(model)
    optimizer = build_optimizer(model, Optimizer(name="muon", lr=1e-2, weight_decay=0.0))
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
    step_unless(optimizer, torch.tensor(False))
    moved = {name: (after - before[name]) / 1e-2 for name, after in weights_of(model).items()}
    return [(n, float(m.pow(2).mean().sqrt())) for n, m in moved.items() if m.ndim == 2]


def test_every_matrix_moves_as_far_as_under_adamw() -> None:
    (moved,) = on_ranks(1, as_adamw_moves)
    for name, rms in moved:
        assert rms == pytest.approx(0.2 if ".blocks." in name else 1.0, rel=0.25), name


def swapped(ranks: Ranks, n: int, k: int, first: int) -> tuple[list[int], bool]:
    """Take rows of k matrices to their owners and back; return who owns what, and if all holds."""
    from torch.distributed.tensor import Shard, distribute_tensor

    wholes = [torch.arange(n * 3.0).view(n, 3) + 100 * i for i in range(k)]
    held = [distribute_tensor(w, ranks.mesh, [Shard(0)], src_data_rank=None) for w in wholes]
    exchange = Exchange.of(held, first)
    mine = exchange.owned[ranks.rank]
    got = exchange.to_owners([tensor.to_local().bfloat16() for tensor in held])
    right = all(torch.equal(got[j], wholes[i].bfloat16()) for j, i in enumerate(mine))
    back = exchange.to_holders(got * 2)
    doubled = [tensor.to_local().bfloat16() * 2 for tensor in held]
    return list(mine), right and all(map(torch.equal, back, doubled))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("n", "k", "first"), [(6, 4, 0), (4, 1, 2), (1, 5, 1)])
def test_each_matrix_is_whole_on_one_rank_and_its_rows_come_back(
    world_size: int, n: int, k: int, first: int
) -> None:
    results = on_ranks(world_size, swapped, n, k, first)
    assert all(right for _, right in results)
    assert sorted(i for mine, _ in results for i in mine) == list(range(k))
    assert max(len(mine) for mine, _ in results) == -(-k // world_size), "work is divided"
    assert 0 in results[first % world_size][0], "the next rank in turn owns the first"


def test_singular_values_end_near_one_whatever_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 24, 24), (2, 40, 12), (2, 12, 40)):
        matrices = torch.randn(shape, generator=generator)
        for factor, dtype in ((1e-6, torch.bfloat16), (1.0, torch.float32), (1e15, torch.bfloat16)):
            found = orthogonalised((matrices * factor).to(dtype))
            assert found.dtype == dtype
            values = torch.linalg.svdvals(found.float())
            assert 0.1 < values.min() < values.max() < 1.3, (shape, factor)
            assert 0.7 < values.median() < 1.1, (shape, factor)
    assert not orthogonalised(torch.zeros(1, 4, 4)).any()


def with_a_bad_step(ranks: Ranks, factor: float) -> tuple[str, str, str]:
    """Return digests of weights and state: before a bad step, after it, and after a good one."""
    model = sharded(ranks)
    optimizer = build_optimizer(model, MUON)
    digests = []
    for step, (times, bad) in enumerate([(1.0, False), (factor, True), (1.0, False)]):
        # Only one rank's gradient is bad; the verdict is that of all.
        give_gradients(model, step, times if ranks.rank == 0 else 1.0)
        step_unless(optimizer, torch.tensor(bad))
        tensors = training_tensors(model, optimizer)
        digests.append(digest({name: whole(tensor) for name, tensor in tensors.items()}))
    return digests[0], digests[1], digests[2]


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e3])
def test_a_bad_step_moves_neither_weights_nor_momentum(factor: float) -> None:
    for before, after, later in on_ranks(2, with_a_bad_step, factor):
        assert after == before
        assert later != after


def resumed(ranks: Ranks, root: Path) -> tuple[str, str]:
    """Return digests of what was loaded, and of what a step makes of it."""
    state, loaded, rejected = load_newest(ranks, root, optimizer=MUON)
    assert state is not None and not rejected
    model = sharded(ranks)
    optimizer = build_optimizer(model, MUON)
    tensors = training_tensors(model, optimizer)
    from mpt.checkpoint.load import restore

    restore(root / "checkpoints", tensors, TINY, ranks, reject=lambda *_: None)
    give_gradients(model, 7)
    step_unless(optimizer, torch.tensor(False))
    return loaded, digest_whole(training_tensors(model, optimizer))


def test_momentum_and_moments_are_saved_and_loaded_at_any_world_size(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    (saved, _), _ = on_ranks(2, save_all, tmp_path, (1, 2), 3, MUON)
    stepped = set()
    for world_size in (1, 3):
        for loaded, after in on_ranks(world_size, resumed, tmp_path):
            assert loaded == saved[2]
            stepped.add((world_size, after))
    assert len(stepped) == 2, "ranks of one group agree"
