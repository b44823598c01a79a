"""What a recipe will cost before anything is started: FLOPs, memory, disk, by arithmetic alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from mpt.recipe.activations import (
    BYTES,
    HEAD_ROWS,
    QUERY_BLOCK,
    Attention,
    Precision,
    Recompute,
    activation_bytes,
)
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.recipe.size import (
    block_parameters,
    kinds,
    matrix_parameters,
    n_parameters,
    reach,
    root_parameters,
)
from mpt.recipe.train import OptimizerName
from mpt.recipe.unusual import unusual

__all__ = [
    "BYTES",
    "HEAD_ROWS",
    "QUERY_BLOCK",
    "Attention",
    "Plan",
    "Precision",
    "Recompute",
    "activation_bytes",
    "auto_microbatch_size",
    "causal_flops_per_token",
    "flops_per_token",
    "kept_gathered_bytes",
    "n_parameters",
    "plan",
    "saved_bytes",
    "state_bytes_per_rank",
    "total_flops",
    "whole_gradient_bytes",
]


def flops_per_token(model: Model) -> float:
    """Return the FLOPs of training on one token: 6 N + 12 L d S, attention counted in full.

    N counts the tied embedding once: its rows are looked up for free, but the head multiplies by
    them. Embeddings that are only looked up, of positions or beside an untied head, do not count.
    d is the width of all heads of queries; where a block has a sliding window, S is what a token
    sees through it. Recomputation is not counted. This is the numerator of MFU.

    Source:
        Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    seen = sum(n * reach(model, layer) for layer, n in kinds(model).items())
    return 6.0 * _n_multiplying(model) + 12.0 * model.q_width * seen


def causal_flops_per_token(model: Model) -> float:
    """Return the same with the scores alone that count: under a causal mask, half of them.

    Through a window of W tokens it is W - W**2 / 2S of them, for the first tokens see fewer.
    """
    seen = 0.0
    for layer, n in kinds(model).items():
        most = reach(model, layer)
        seen += n * (most - most**2 / (2 * model.max_seq_len))
    return 6.0 * _n_multiplying(model) + 12.0 * model.q_width * seen


def total_flops(recipe: Recipe) -> float:
    """Return the FLOPs of the whole run; while samples are cut, a token sees fewer others."""
    model, train = recipe.model, recipe.train
    tokens_per_step = train.global_batch_size * model.max_seq_len
    lengths = Counter(
        train.sequence_length(step, model.max_seq_len) for step in range(train.warming)
    )
    lengths[model.max_seq_len] += train.steps - train.warming
    return tokens_per_step * sum(
        n * flops_per_token(replace(model, max_seq_len=length)) for length, n in lengths.items()
    )


def _n_multiplying(model: Model) -> int:
    rows = 0 if model.tie_word_embeddings else model.vocab_size
    rows += model.max_seq_len if model.learned_pos_emb else 0
    return n_parameters(model) - rows * model.d_model


def saved_bytes(model: Model, optimizer: OptimizerName = "adamw") -> int:
    """Return the bytes of a checkpoint: weights and moments, each fp32.

    AdamW has two moments of a parameter. Muon has one of those that it takes, the matrices within
    blocks; the others are AdamW's.
    """
    words = 3 * n_parameters(model)
    if optimizer == "muon":
        words -= sum(n * matrix_parameters(model, layer) for layer, n in kinds(model).items())
    return BYTES["fp32"] * words


def state_bytes_per_rank(model: Model, n_shards: int, optimizer: OptimizerName = "adamw") -> int:
    """Return the bytes of training state that a rank holds, activations aside.

    Weights, moments and gradients, with AdamW 16 bytes a parameter, over `n_shards`, the ranks
    that one copy of the model is sharded over. On top comes the bf16 working copy of what is
    gathered at one time: the largest block, and what lies outside of blocks.
    """
    state = saved_bytes(model, optimizer) + BYTES["fp32"] * n_parameters(model)  # gradients
    sharded = -(-state // n_shards)
    return sharded + BYTES["bf16"] * (_largest_block(model) + root_parameters(model))


def kept_gathered_bytes(model: Model, precision: Precision) -> int:
    """Return what it takes on top to keep every block's weights gathered, not one at a time."""
    blocks = n_parameters(model) - root_parameters(model)
    return BYTES[precision] * (blocks - _largest_block(model))


def whole_gradient_bytes(model: Model, n_shards: int) -> int:
    """Return what it takes on top to sum up whole gradients in fp32, and reduce them at last."""
    return BYTES["fp32"] * (n_parameters(model) - -(-n_parameters(model) // n_shards))


def _largest_block(model: Model) -> int:
    return max(block_parameters(model, layer) for layer in kinds(model))


def auto_microbatch_size(
    model: Model,
    *,
    share: int,
    budget_bytes: int,
    precision: Precision,
    attention: Attention = "blocks",
    recompute: Recompute = "none",
) -> int:
    """Return the size of a microbatch when the share is cut into the fewest that fit the budget.

    They are as equal as they can be: what does not fill the last one is padding, computed for
    nothing.

    Args:
        share: this rank's samples of a global batch, at least 1.
        budget_bytes: memory left for activations after `state_bytes_per_rank`.
        attention: how attention is computed.
        recompute: what blocks make again in the backward pass.

    Returns:
        At least 1: whether a single sample fits is for the device to say.
    """
    for n_microbatches in range(1, share):
        size = -(-share // n_microbatches)
        if activation_bytes(model, size, precision, attention, recompute) <= budget_bytes:
            return size
    return 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `mpt train --check` shows: all of it follows from the recipe and the world size."""

    world_size: int
    n_parameters: int
    unusual: list[str]
    """Options at which the model is not as MPT was released, as `key: value`."""
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
    attention: Attention
    """As the recipe has it; where it says auto, what the caller thinks will be chosen."""
    recompute: Recompute
    """The same of activation checkpointing."""
    activation_bytes: int
    """Estimate for one microbatch of that size and precision, with that attention."""
    memory_bytes_per_rank: int
    """State and activations together, and gathered weights and whole gradients if they are kept."""
    n_checkpoints: int
    """Saved over the run, the last step included."""
    n_checkpoints_kept: int
    bytes_per_checkpoint: int
    """Weights and moments in fp32."""


def plan(
    recipe: Recipe,
    world_size: int,
    attention: Attention = "blocks",
    recompute: Recompute = "none",
    replicas: int = 1,
    beside_bytes: int = 0,
) -> Plan:
    """Return what the recipe will do and need on `world_size` ranks.

    Args:
        attention: what is taken where the recipe says auto.
        recompute: the same of activation checkpointing.
        replicas: the same of copies of the sharded model.
        beside_bytes: what else a rank keeps, as `mpt.recipe.fit.beside_bytes` says.
    """
    model, train = recipe.model, recipe.train
    share = -(-train.global_batch_size // world_size)
    microbatch_size = 1 if train.microbatch_size == "auto" else min(train.microbatch_size, share)
    precision: Precision = "bf16" if train.precision == "auto" else train.precision
    if train.attention != "auto":
        attention = train.attention
    if train.activation_checkpointing != "auto":
        recompute = train.activation_checkpointing
    if train.replicas != "auto":
        replicas = train.replicas
    state = state_bytes_per_rank(model, world_size // replicas, recipe.optimizer.name)
    activations = activation_bytes(model, microbatch_size, precision, attention, recompute)
    tokens_per_step = train.global_batch_size * model.max_seq_len
    total_tokens = train.steps * tokens_per_step
    n_checkpoints = -(-train.steps // recipe.checkpoint.every_steps)
    return Plan(
        world_size=world_size,
        n_parameters=n_parameters(model),
        unusual=unusual(model),
        samples_per_step=train.global_batch_size,
        tokens_per_step=tokens_per_step,
        steps=train.steps,
        total_tokens=total_tokens,
        flops_per_token=flops_per_token(model),
        total_flops=total_flops(recipe),
        state_bytes_per_rank=state,
        microbatch_size=microbatch_size,
        precision=precision,
        attention=attention,
        recompute=recompute,
        activation_bytes=activations,
        memory_bytes_per_rank=state + activations + beside_bytes,
        n_checkpoints=n_checkpoints,
        n_checkpoints_kept=min(n_checkpoints, recipe.checkpoint.keep),
        bytes_per_checkpoint=saved_bytes(model, recipe.optimizer.name),
    )
