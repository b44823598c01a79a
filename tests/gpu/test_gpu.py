"""On a GPU: the same laws as on the CPU, against the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.checkpoint.load import restore
from mpt.dist import process_group
from mpt.launch.pulse import anonymous_file
from mpt.model.attend import Scores, attend_with
from mpt.model.network import MPT
from mpt.model.position import alibi_slopes
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer, training_tensors
from mpt.recipe.train import Optimizer
from mpt.state import IGNORE, Microbatch, RunState, StepResult
from mpt.train.step import train_step
from tests.dist.saving import memory_in, saver_in
from tests.test_watch import watch_in
from tests.tiny_model import TINY, digest, sharded, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of a single rank."""
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }.items():
        monkeypatch.setenv(key, value)


def batch(device: torch.device) -> Microbatch:
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY.max_seq_len))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    return Microbatch(tokens.to(device), targets.to(device))


def test_attention_on_the_gpu_equals_the_cpu() -> None:
    q, k, v = torch.randn(3, 2, 3, 200, 16)
    slopes, attend = alibi_slopes(3), attend_with("sdpa")
    here = attend(q, k, v, Scores(0.3, slopes))
    there = attend(q.cuda(), k.cuda(), v.cuda(), Scores(0.3, slopes.cuda()))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


def test_a_step_on_the_gpu_equals_the_cpu() -> None:
    with process_group() as ranks:
        model = sharded(ranks)
        plain = MPT(TINY)
        plain.load_state_dict({name: whole(p).cpu() for name, p in model.named_parameters()})
        optimizer = build_optimizer(model, Optimizer(lr=1e-3))
        there = batch(ranks.device)
        expected = (
            plain(there.tokens.cpu(), there.targets.cpu()).nats / (there.targets != IGNORE).sum()
        )
        result = train_step(model, optimizer, [there], next_token_loss, max_grad_norm=1.0)
        assert float(result.loss) == pytest.approx(float(expected), rel=1e-3)
        assert bool(result.applied)


def test_the_step_never_makes_the_host_wait_for_the_gpu() -> None:
    with process_group() as ranks:
        model = sharded(ranks)
        optimizer = build_optimizer(model, Optimizer(lr=1e-3))
        there = batch(ranks.device)
        for _ in range(2):
            train_step(model, optimizer, [there], next_token_loss, max_grad_norm=1.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(model, optimizer, [there], next_token_loss, max_grad_norm=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_save_then_load_is_the_identity_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    with process_group() as ranks:
        model = sharded(ranks)
        optimizer = build_optimizer(model, Optimizer(lr=1e-2))
        tensors = training_tensors(model, optimizer)
        train_step(model, optimizer, [batch(ranks.device)], next_token_loss, max_grad_norm=1.0)
        saved = digest({name: whole(t).cpu() for name, t in tensors.items()})
        saver = saver_in(tmp_path, tensors, ranks, lambda *_, **__: None)
        saver.save(RunState(1, 4, 64))
        for tensor in tensors.values():
            tensor.zero_()
        saver.close()
        restore(tmp_path / "checkpoints", tensors, TINY, ranks, reject=print)
        assert digest({name: whole(t).cpu() for name, t in tensors.items()}) == saved


def test_a_copy_in_memory_is_the_identity_on_the_gpu() -> None:
    with process_group() as ranks:
        model = sharded(ranks)
        optimizer = build_optimizer(model, Optimizer(lr=1e-2))
        tensors = training_tensors(model, optimizer)
        train_step(model, optimizer, [batch(ranks.device)], next_token_loss, max_grad_norm=1.0)
        saved = digest({name: whole(t).cpu() for name, t in tensors.items()})
        descriptor = anonymous_file("mpt-test")
        memory = memory_in(f"/proc/self/fd/{descriptor}", tensors, ranks)
        memory.take(RunState(1, 4, 64))
        for tensor in tensors.values():
            tensor.zero_()
        memory.wait()
        assert memory.newest_common() == RunState(1, 4, 64)
        memory.load(1)
        assert digest({name: whole(t).cpu() for name, t in tensors.items()}) == saved


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_compiled_block_makes_the_same_again_on_the_gpu(backend: Any, how: Any) -> None:
    cfg = replace(TINY, d_model=128, max_seq_len=200)
    tokens = torch.randint(0, cfg.vocab_size, (2, cfg.max_seq_len), device="cuda")

    def gradients(backend: Any, how: Any, compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = MPT(cfg, backend, recompute=how).cuda()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        for block in network.transformer.blocks if compiled else ():
            block.compile(fullgraph=True)
        objective = network(tokens, tokens.roll(-1, dims=1)).objective
        return list(torch.autograd.grad(objective, list(network.parameters())))

    expected = gradients("sdpa", "none", False)
    for ours, theirs in zip(gradients(backend, how, True), expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_a_result_is_read_before_the_next_step_is_over(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    dtypes = (None, None, torch.bool, torch.int64)
    taken = StepResult(*(torch.ones((), device=gpu, dtype=dtype) for dtype in dtypes))
    watch, _ = watch_in(tmp_path, lambda _: None)
    state, after = RunState(3, 18, 180), torch.cuda.Event()
    watch.queued(state, taken, before=12, limit=5.0, lr=0.1, began=0.0, data_wait_s=0.0)
    torch.cuda._sleep(10**9)  # half a second: the next step, queued behind it
    after.record()
    assert watch.settle(state).vitals.losses == ((3, 1.0),)
    assert not after.query(), "the host has waited for the next step"
