"""What a recipe will cost before anything is started: FLOPs, memory, disk, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe

Precision = Literal["bf16", "fp32"]

BYTES = {"bf16": 2, "fp32": 4}
HEAD_ROWS = 512
"""Rows of logits that exist at a time: the head is computed in chunks of so many positions."""
QUERY_BLOCK = 128
"""Queries that attention handles at a time where it is not fused."""
_STATE_BYTES = 4 + 4 + 4 + 4
"""Per parameter: master weight, two moments, gradient, each fp32."""
_SAVED_BYTES = 4 + 4 + 4
"""Per parameter in a checkpoint: master weight and two moments."""


def flops_per_token(model: Model) -> float:
    """Return the FLOPs of training on one token: 6 N + 12 L d S, attention counted in full.

    N counts the tied embedding once: its rows are looked up for free, but the head multiplies by
    them. Recomputation is not counted. This is the numerator of MFU.

    Source:
        Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    return 6.0 * model.n_parameters + 2 * _causal_attention(model)


def causal_flops_per_token(model: Model) -> float:
    """Return the same with attention halved: under a causal mask half the scores are not needed."""
    return 6.0 * model.n_parameters + _causal_attention(model)


def _causal_attention(model: Model) -> float:
    return 6.0 * model.n_layers * model.d_model * model.max_seq_len


def state_bytes_per_rank(model: Model, world_size: int) -> int:
    """Return the bytes of training state that a rank holds, activations aside.

    Weights, moments and gradients are sharded, 16 bytes a parameter over `world_size`. On top
    comes the bf16 working copy of what is gathered at one time: a block and the tied embedding.
    """
    embedding = model.vocab_size * model.d_model
    block = (model.n_parameters - embedding - model.d_model) // model.n_layers
    sharded = -(-_STATE_BYTES * model.n_parameters // world_size)
    return sharded + BYTES["bf16"] * (block + embedding)


def activation_bytes(model: Model, microbatch_size: int, precision: Precision) -> int:
    """Estimate the bytes of tensors kept for the backward pass of one microbatch.

    Without activation checkpointing. A block keeps, in values of the compute dtype:
    - (8 + 2E) B S D: both norms' inputs (2) and outputs (2), q, k and v (3), what attention puts
      out (1), the feed-forward before and after its activation (2E). clip_qkv adds 3 B S D, and
      resid_pdrop a mask of B S D for each of its two uses.
    - B H S (S + 128) / 2 attention weights: the causal half, rounded up to query blocks.
      attn_pdrop makes that four times as much. With an additive bias, as on a GPU today,
      torch keeps H S S more a block whatever B is: that is not counted.
    Outside the blocks: the last norm's input and output and the gradient at the head (3 B S D);
    the head's gradient in fp32 (V D); and for one chunk of HEAD_ROWS positions, never for all,
    logits and their gradient in fp32 and once in the compute dtype.
    Not counted: the allocator's rounding, libraries, and what lives only within one operation.
    """
    value = BYTES[precision]
    tokens = microbatch_size * model.max_seq_len
    width = tokens * model.d_model
    keys = min(model.max_seq_len, (model.max_seq_len + QUERY_BLOCK) // 2)
    weights = tokens * model.n_heads * keys * (4 if model.attn_pdrop > 0 else 1)
    n_widths = 8 + 2 * model.expansion_ratio
    n_widths += 3 * (model.clip_qkv is not None) + 2 * (model.resid_pdrop > 0)
    n_outside = 3 + (model.emb_pdrop > 0)
    chunk = min(HEAD_ROWS, tokens) * model.vocab_size * (2 * BYTES["fp32"] + value)
    head = chunk + BYTES["fp32"] * model.vocab_size * model.d_model
    return value * (model.n_layers * (n_widths * width + weights) + n_outside * width) + head


def auto_microbatch_size(
    model: Model, *, share: int, budget_bytes: int, precision: Precision
) -> int:
    """Return the size of a microbatch when the share is cut into the fewest that fit the budget.

    They are as equal as they can be: what does not fill the last one is padding, computed for
    nothing.

    Args:
        model: the shape of the network.
        share: this rank's samples of a global batch, at least 1.
        budget_bytes: memory left for activations after `state_bytes_per_rank`.
        precision: the compute dtype.

    Returns:
        At least 1: whether a single sample fits is for the device to say.
    """
    for n_microbatches in range(1, share):
        size = -(-share // n_microbatches)
        if activation_bytes(model, size, precision) <= budget_bytes:
            return size
    return 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `mpt train --check` shows: all of it follows from the recipe and the world size."""

    world_size: int
    n_parameters: int
    samples_per_step: int
    tokens_per_step: int
    steps: int
    total_tokens: int
    """Tokens read in the whole run; how many epochs that is, only the data can say."""
    flops_per_token: float
    total_flops: float
    state_bytes_per_rank: int
    microbatch_size: int
    """As the recipe has it, at most a rank's share of a step; 1 where the recipe says auto."""
    precision: Precision
    """As the recipe has it; bf16 where it says auto."""
    activation_bytes: int
    """Estimate for one microbatch of that size and precision."""
    n_checkpoints: int
    """Saved over the run, the last step included."""
    n_checkpoints_kept: int
    bytes_per_checkpoint: int
    """Weights and two moments in fp32: 12 bytes a parameter."""


def plan(recipe: Recipe, world_size: int) -> Plan:
    """Return what the recipe will do and need on `world_size` ranks."""
    model, train = recipe.model, recipe.train
    share = -(-train.global_batch_size // world_size)
    microbatch_size = 1 if train.microbatch_size == "auto" else min(train.microbatch_size, share)
    precision: Precision = "bf16" if train.precision == "auto" else train.precision
    tokens_per_step = train.global_batch_size * model.max_seq_len
    total_tokens = train.steps * tokens_per_step
    n_checkpoints = -(-train.steps // recipe.checkpoint.every_steps)
    return Plan(
        world_size=world_size,
        n_parameters=model.n_parameters,
        samples_per_step=train.global_batch_size,
        tokens_per_step=tokens_per_step,
        steps=train.steps,
        total_tokens=total_tokens,
        flops_per_token=flops_per_token(model),
        total_flops=flops_per_token(model) * total_tokens,
        state_bytes_per_rank=state_bytes_per_rank(model, world_size),
        microbatch_size=microbatch_size,
        precision=precision,
        activation_bytes=activation_bytes(model, microbatch_size, precision),
        n_checkpoints=n_checkpoints,
        n_checkpoints_kept=min(n_checkpoints, recipe.checkpoint.keep),
        bytes_per_checkpoint=_SAVED_BYTES * model.n_parameters,
    )
