"""Compare ways of computing causal attention on a CPU: the time of forward and backward pass.

    python -m tests.bench.attention_cpu

On one thread, in seconds of that thread, and in turns: so other work on the machine counts little.
Memory is set up as a rank's is. The first three ways have ALiBi; the last two leave it out, which
is what a model with another kind of position needs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mpt.launch.plan import GLIBC_KEEPS_MEMORY
from mpt.model.blocks import attend_blocks
from mpt.model.position import alibi_slopes
from mpt.model.scores import Attend, Scores
from mpt.model.sdpa import attend_sdpa
from mpt.model.wide import attend_wide

ROUNDS = 7
SHAPES = {
    "d384 h6 B4 S512": (4, 6, 512, 64),
    "125M h12 B1 S1024": (1, 12, 1024, 64),
    "125M h12 B1 S2048": (1, 12, 2048, 64),
}
BASE = "blocks"


def without_alibi(attend: Attend) -> Attend:
    """The same for a model that has no ALiBi."""
    return lambda q, k, v, scores: attend(q, k, v, scores._replace(slopes=None))


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Scores], Tensor]] = {
    "full bias": attend_sdpa,
    "blocks": attend_blocks,
    "wide": attend_wide,
    "blocks, no ALiBi": without_alibi(attend_blocks),
    "fused, no ALiBi": without_alibi(attend_sdpa),
}


def measure(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the seconds that each way took in each round."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    d_out = torch.randn(shape, dtype=dtype)
    scores = Scores(shape[-1] ** -0.5, alibi_slopes(shape[1]))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(1 + ROUNDS):
        for name, attend in WAYS.items():
            begin = time.process_time()
            torch.autograd.grad(attend(q, k, v, scores), (q, k, v), d_out)
            seconds[name].append(time.process_time() - begin)
    return {name: taken[1:] for name, taken in seconds.items()}  # the first one warms up


def main() -> None:
    """Print a table of medians, and of medians of ratios to `blocks`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f"torch {torch.__version__}, 1 thread, {ROUNDS} rounds")
    print(f"{'shape':18} {'dtype':9} {'way':17} {'ms':>7} {'x blocks':>9}")
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            seconds = measure(shape, dtype)
            for way, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(taken, seconds[BASE], strict=True))
                label = str(dtype).removeprefix("torch.")
                ms = 1e3 * statistics.median(taken)
                print(f"{name:18} {label:9} {way:17} {ms:7.1f} {ratio:9.2f}")


if __name__ == "__main__":
    if (
        not GLIBC_KEEPS_MEMORY.items() <= os.environ.items()
    ):  # glibc reads them when a process starts
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.bench.attention_cpu"],
            {**os.environ, **GLIBC_KEEPS_MEMORY},
        )
    main()
