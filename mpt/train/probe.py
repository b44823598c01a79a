"""Times real passes at several sizes of microbatch before the first step, and takes the fastest.

The run does not notice: weights, moments and random numbers are as they were, and what it
computes from here on is what it computes when the same size is given by hand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mpt.dist import Ranks, max_over_ranks
from mpt.objective import next_token_loss
from mpt.recipe import Recipe
from mpt.recipe.fit import Fit, at_size
from mpt.recipe.machine import Machine
from mpt.recipe.probing import ROUNDS, Tried, fastest, next_size
from mpt.recipe.room import share_of
from mpt.state import Microbatch


def probe(
    model: nn.Module,
    recipe: Recipe,
    machine: Machine,
    chosen: Fit,
    ranks: Ranks,
    *,
    beat: Callable[[], None],
) -> tuple[Fit, list[Tried]]:
    """Return the choice with the fastest size of microbatch that fits, and what was tried.

    All ranks try the same sizes, and the slowest and the fullest of them count. Larger ones than
    the estimate's are tried on GPUs alone, where what a size takes can be measured, and only if
    what was measured before says that they fit: running out of memory inside FSDP is no probe.

    Args:
        chosen: what the model was built for.
        beat: is called before each size: the process is alive.
    """
    share = share_of(recipe, ranks.world_size)
    tried: list[Tried] = []
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        while size := next_size(tried, chosen.microbatch_size, share, machine.memory_bytes):
            beat()
            at = at_size(chosen, recipe, machine, ranks.world_size, size)
            tried.append(_try(model, recipe, at, share, ranks))
    size = fastest(tried, machine.memory_bytes).microbatch_size
    return at_size(chosen, recipe, machine, ranks.world_size, size), tried


def _try(model: nn.Module, recipe: Recipe, at: Fit, share: int, ranks: Ranks) -> Tried:
    """Take a few rounds of passes and throw their gradients away."""
    size = at.microbatch_size
    n = -(-share // size)
    microbatch = random_microbatch(recipe, size, ranks)
    # In a step of several microbatches, those before the last do without the reduction.
    kinds = (False, True) if n > 1 and at.reduce_gradients == "once" else (True,)
    resident = _forget_peak(ranks.device)
    rounds = []
    for _ in range(1 + ROUNDS):
        seconds = [_time_pass(model, microbatch, reduce, ranks.device) for reduce in kinds]
        rounds.append(seconds[0] * (n - 1) + seconds[-1])
        model.zero_grad(set_to_none=True)
    mine = statistics.median(rounds[1:])  # the first one compiles and takes memory
    worst_ns = max_over_ranks(round(mine * 1e9))
    peak = None if resident is None else max_over_ranks(torch.cuda.max_memory_allocated())
    if resident is not None:
        torch.cuda.empty_cache()  # what it kept in pieces of this size is of no use to the next
        resident = max_over_ranks(resident)
    return Tried(
        microbatch_size=size, step_s=worst_ns / 1e9, resident_bytes=resident, peak_bytes=peak
    )


def _time_pass(
    model: nn.Module, microbatch: Microbatch, reduce: bool, device: torch.device
) -> float:
    """Return the seconds of a forward and a backward pass."""
    began = time.perf_counter()
    cast(FSDPModule, model).set_requires_gradient_sync(reduce)
    # Divided, as a step does: sums over many tokens could overflow where means do not.
    (next_token_loss(model, microbatch).objective / microbatch.targets.numel()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def random_microbatch(recipe: Recipe, size: int, ranks: Ranks) -> Microbatch:
    """Return tokens drawn evenly from the vocabulary, in the shape that the loader gives."""
    model = recipe.model
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (size, model.max_seq_len)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(ranks.device)
    documents = torch.zeros_like(tokens) if model.attn_uses_sequence_id else None
    return Microbatch(tokens, tokens.roll(-1, dims=1), documents)


def _forget_peak(device: torch.device) -> int | None:
    """Return what tensors take of a GPU's memory now, the least that its peak can be."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))
