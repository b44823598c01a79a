"""Tokens per second of generation on this CPU, with a cache of keys and values and without.

    python tests/bench/generate.py

Rounds of all cases are interleaved; what is shown are medians. Without a cache every token reads
the whole text; that is timed at lengths evenly spread over those of the text. On a machine that
others use too, `--threads 1 --cpu-time` counts seconds of the CPU's work in place of those that
pass.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from mpt.generate.loop import Options, generate
from mpt.generate.read import read_anew
from mpt.generate.sample import Sampling
from mpt.model.network import MPT
from mpt.recipe.model import Model

Clock = Callable[[], float]  # seconds

PROMPT, NEW = 128, 64  # tokens
N_LENGTHS = 2
SHAPES = {
    "tiny": Model(d_model=128, n_heads=4, n_layers=4, max_seq_len=256, vocab_size=4096),
    "125m": Model(d_model=768, n_heads=12, n_layers=12, max_seq_len=2048, vocab_size=50432),
}
WAYS: dict[str, Sampling] = {
    "greedy": Sampling(temperature=0),
    "top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
}


def cached(network: MPT, prompts: list[list[int]], sampling: Sampling, *, clock: Clock) -> float:
    """Return tokens per second, the reading of the prompts included."""
    options = Options(
        tokens=NEW, context=PROMPT + NEW, sampling=sampling, batch=len(prompts), seed=1
    )
    begun = clock()
    n_tokens = sum(1 for _ in generate(network, prompts, options))
    return n_tokens / (clock() - begun)


def uncached(network: MPT, prompts: list[list[int]], *, clock: Clock) -> float:
    """Return tokens per second where each of them reads the whole text anew."""
    lengths = [PROMPT + NEW * (2 * n + 1) // (2 * N_LENGTHS) for n in range(N_LENGTHS)]
    begun = clock()
    for length in lengths:
        read_anew(network, [(prompt * 2)[:length] for prompt in prompts], length)
    return len(prompts) * N_LENGTHS / (clock() - begun)


def cases(shape: str, clock: Clock) -> dict[tuple[str, ...], Callable[[], float]]:
    """Return what is timed, under the words of its row."""
    torch.manual_seed(0)
    network = MPT(SHAPES[shape]).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    found: dict[tuple[str, ...], Callable[[], float]] = {}
    for n_prompts in (1, 8):
        prompts = torch.randint(SHAPES[shape].vocab_size, (n_prompts, PROMPT)).tolist()
        row = (shape, str(n_prompts))
        found[(*row, "no cache")] = partial(uncached, network, prompts, clock=clock)
        for name, sampling in WAYS.items():
            found[(*row, f"cache, {name}")] = partial(
                cached, network, prompts, sampling, clock=clock
            )
    return found


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    clock = time.process_time if asked.cpu_time else time.perf_counter
    torch.set_num_threads(asked.threads)
    every = {row: run for shape in asked.models for row, run in cases(shape, clock).items()}
    rates: dict[tuple[str, ...], list[float]] = {row: [] for row in every}
    for _ in range(asked.rounds):
        for row, run in every.items():
            rates[row].append(run())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, fp32, ", end="")
    print(f"{asked.threads} threads, {clock.__name__}")
    print(f"prompts of {PROMPT} tokens, {NEW} new ones each, {asked.rounds} rounds")
    print(f"{'model':8}{'batch':>6}  {'how':20}{'tokens/s':>10}{'times':>8}")
    for row, found in rates.items():
        rate = median(found)
        slow = median(rates[(*row[:2], "no cache")])
        print(f"{row[0]:8}{row[1]:>6}  {row[2]:20}{rate:>10,.1f}{rate / slow:>8.1f}")


if __name__ == "__main__":
    main()
