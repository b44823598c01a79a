"""One contestant of `tests.bench.compare`, in a process of its own: builds, warms up, and waits.

    python -m tests.bench.contestants NAME SHAPE_AS_JSON THREADS

It says that it is ready, and then takes as many steps as each line of its input asks for, and
answers each with a line of JSON. A step is what its users' loops do: forward, backward, clip to
norm 1, AdamW with decay, gradients dropped; on the same random tokens.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLIP, RATE, BETAS, DECAY = 1.0, 6e-4, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Shape:
    """A model of the GPT kind, and what it is fed."""

    d_model: int
    n_heads: int
    n_layers: int
    sample: int
    """Tokens."""
    vocab_size: int
    batch: int
    """Samples of a step, which is one microbatch."""
    precision: str
    """bf16 or fp32."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sample

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return tokens and what follows each: the same for every contestant."""
        size = (self.batch, self.sample + 1)
        drawn = torch.randint(0, self.vocab_size, size, generator=torch.Generator().manual_seed(0))
        drawn = drawn.to(DEVICE)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    @property
    def autocast(self) -> Any:
        """What a peer's forward pass runs in: fp32 weights, bf16 where torch deems it safe."""
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16")


@contextmanager
def ours(shape: Shape) -> Iterator[Callable[[int], None]]:
    """`mpt`, by the code of `mpt bench`: sharded over one rank, every `auto` as in training."""
    from mpt import recipe
    from mpt.bench.measure import Course
    from mpt.dist import process_group

    torch.set_flush_denormal(True)  # as its workers do
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        text = f"""
            {{run: compare, seed: 1, tokenizer: {{path: none}},
            model: {{d_model: {shape.d_model}, n_heads: {shape.n_heads},
              n_layers: {shape.n_layers}, max_seq_len: {shape.sample},
              vocab_size: {shape.vocab_size}}},
            data: {{streams: {{none: {{path: none}}}}}},
            train: {{steps: 1000000, global_batch_size: {shape.batch},
              microbatch_size: {shape.batch}, precision: {shape.precision},
              max_grad_norm: {CLIP}}},
            optimizer: {{lr: {RATE}, betas: {list(BETAS)}, weight_decay: {DECAY}}},
            schedule: {{name: constant}}}}
        """
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        with process_group() as ranks, Course.prepared(recipe.load(path), ranks, real=False) as run:
            yield lambda steps: _discard(run.take(steps))


def _discard(_: object) -> None:
    """Losses are of no interest here."""


@contextmanager
def transformers(shape: Shape) -> Iterator[Callable[[int], None]]:
    """transformers' MptForCausalLM in the loop of its Trainer: autocast, clipped, fused AdamW."""
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        n_layers=shape.n_layers,
        max_seq_len=shape.sample,
        vocab_size=shape.vocab_size,
        use_cache=False,
    )
    model = cast(nn.Module, MptForCausalLM(config)).to(DEVICE).train()
    tokens, targets = shape.draw()
    # The model shifts labels itself; what it drops at the end is one target of each sample.
    labels = torch.cat([tokens[:, :1], targets[:, :-1]], dim=1)
    yield _plain_loop(shape, model, lambda: model(input_ids=tokens, labels=labels).loss)


@contextmanager
def nanogpt(shape: Shape) -> Iterator[Callable[[int], None]]:
    """The yardstick: a GPT in plain torch, compiled whole."""
    model = _Gpt(shape).to(DEVICE)
    compiled = torch.compile(model)
    tokens, targets = shape.draw()
    yield _plain_loop(shape, model, lambda: compiled(tokens, targets))


def _plain_loop(
    shape: Shape, model: nn.Module, loss_of: Callable[[], Tensor]
) -> Callable[[int], None]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)

    def take(steps: int) -> None:
        for _ in range(steps):
            with shape.autocast:
                loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return take


class _Gpt(nn.Module):
    """GPT-2 as nanoGPT has it: learned positions, causal SDPA, tied head, no biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D = shape.d_model
        self.wte, self.wpe = nn.Embedding(shape.vocab_size, D), nn.Embedding(shape.sample, D)
        self.blocks = nn.ModuleList(_Block(D, shape.n_heads) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(D, bias=False)
        self.head = nn.Linear(D, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(
            torch.arange(tokens.shape[1], device=tokens.device)
        )  # (B, S, D)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class _Block(nn.Module):
    def __init__(self, D: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


CONTESTANTS = {"mpt": ours, "transformers": transformers, "nanogpt": nanogpt}


def main() -> None:
    """Answer each line of input, a number of steps, with what they cost."""
    name, shape_as_json, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    shape = Shape(**json.loads(shape_as_json))
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    with CONTESTANTS[name](shape) as take:
        take(3)  # compiles, allocates, and settles
        _catch_up()
        _forget_peak()
        print(json.dumps({"ready": name}), file=answers)
        for line in sys.stdin:
            wall, cpu = time.perf_counter(), _cpu_s()
            take(int(line))
            _catch_up()
            wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
            assert math.isfinite(wall)
            answer = {"wall_s": wall, "cpu_s": cpu, "peak_bytes": _peak_bytes()}
            print(json.dumps(answer), file=answers)
        sys.stdout.flush()
    os._exit(0)


def _cpu_s() -> float:
    """Seconds that all threads of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _catch_up() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The most memory at once since it was ready: the process's, or its tensors' on a GPU."""
    if DEVICE.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


if __name__ == "__main__":
    main()
