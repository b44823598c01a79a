"""What more GPUs cost each of them, on paper: FLOPs, bytes, and what communication cannot hide.

Pure arithmetic on a recipe's model and a cluster. The assumptions are the fields of `Cluster`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpt.recipe.budget import flops_per_token
from mpt.recipe.model import Model
from mpt.recipe.size import n_parameters

_COMPUTE_BYTES, _REDUCE_BYTES = 2, 4
"""Of a parameter that is gathered (bf16), and of a gradient that is summed (fp32)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs in nodes, and how fast they compute and talk."""

    gpus: int
    gpus_per_node: int = 8
    flops: float = 989.5e12
    """Dense bf16 peak of a GPU per second: H100, H200."""
    node_bytes_per_s: float = 400e9
    """Between nodes, each way, of one node: 8 adapters of 400 Gbit/s."""
    link_bytes_per_s: float = 450e9
    """Within a node, each way, of one GPU: NVLink 4."""
    efficiency: float = 0.7
    """Of both, that collectives reach."""
    lost_per_doubling: float = 0.024
    """Of a step, with each doubling of nodes: waiting for the slowest of more, it seems. No data
    sheet has it; it is the mean of llm-foundry's own losses from 128 to 512 GPUs, 0.7 to
    4.6 %, where by bandwidth alone next to nothing would be lost (tests/bench/scaling.md)."""

    @property
    def nodes(self) -> float:
        return max(1.0, self.gpus / self.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one GPU does in an optimizer step."""

    flops: float
    """6 N + 12 L d S a token, as MFU counts; recomputation is time and not work."""
    gathered_bytes: float
    """Of parameters, that it receives."""
    reduced_bytes: float
    """Of gradients, that it sends."""
    compute_s: float
    communication_s: float
    exposed_s: float
    """Of the communication, what there is no computing to hide behind."""
    lost_s: float
    """Waiting for the slowest."""

    @property
    def slowdown(self) -> float:
        """Time of the step over that of its computing alone."""
        return 1 + (self.exposed_s + self.lost_s) / self.compute_s


def step(
    model: Model,
    cluster: Cluster,
    *,
    microbatch_size: int,
    n_microbatches: int = 1,
    mfu_alone: float,
    reshard: bool = True,
    hybrid: bool = False,
) -> Step:
    """Return what a step costs each GPU.

    Every unit (a block, or what is outside of blocks) is gathered for its forward pass and, if
    resharded, again for its backward pass, in every microbatch; gradients are reduced once, with
    the last. A unit's communication hides behind the computing of the unit before it. What has
    nothing before it stays in sight: the first gather, and the last reduction.

    Args:
        mfu_alone: what a GPU reaches when communication costs nothing; measure it on one node.
        hybrid: shards over a node, replicas over nodes, which sum gradients of shards (HSDP).
    """
    n_units = model.n_layers + 1
    unit = n_parameters(model) / n_units
    tokens = microbatch_size * model.max_seq_len
    flops = flops_per_token(model) * tokens
    compute_s = flops / (cluster.flops * mfu_alone)
    span = min(cluster.gpus, cluster.gpus_per_node) if hybrid else cluster.gpus
    gather_s = _gather_s(_COMPUTE_BYTES * unit, span, cluster)
    reduce_s = _gather_s(_REDUCE_BYTES * unit, span, cluster)
    across_bytes = 0.0
    if hybrid and cluster.nodes > 1:
        across_bytes = 2 * _REDUCE_BYTES * unit / span * (cluster.nodes - 1) / cluster.nodes
        rate = cluster.node_bytes_per_s / cluster.gpus_per_node * cluster.efficiency
        reduce_s += across_bytes / rate
    # Of the computing of a unit a third is forward and two thirds are backward.
    forward_s, backward_s = compute_s / n_units / 3, 2 * compute_s / n_units / 3
    again_s = gather_s if reshard else 0.0
    forward = max(0.0, gather_s - forward_s)
    # Gathers and reductions have streams of their own, and share the wire.
    backward = max(0.0, again_s - backward_s)
    last = max(0.0, again_s + reduce_s - backward_s)
    between = n_units - 1
    exposed_s = n_microbatches * (gather_s + between * forward + between * backward)
    exposed_s += between * (last - backward) + reduce_s
    gathers = n_microbatches * (2 if reshard else 1)
    share = (span - 1) / span
    return Step(
        flops=n_microbatches * flops,
        gathered_bytes=gathers * n_units * _COMPUTE_BYTES * unit * share,
        reduced_bytes=n_units * (_REDUCE_BYTES * unit * share + across_bytes),
        compute_s=n_microbatches * compute_s,
        communication_s=n_units * (gathers * gather_s + reduce_s),
        exposed_s=exposed_s,
        lost_s=cluster.lost_per_doubling * math.log2(cluster.nodes) * n_microbatches * compute_s,
    )


def _gather_s(size: float, span: int, cluster: Cluster) -> float:
    """Return the seconds in which `span` GPUs have all of `size` bytes, or have reduced them."""
    if span == 1:
        return 0.0
    share = (span - 1) / span
    if span <= cluster.gpus_per_node:
        return size * share / (cluster.link_bytes_per_s * cluster.efficiency)
    nodes = span / cluster.gpus_per_node
    # Each byte enters a node once, over all of its adapters; the links inside are faster.
    return size * (nodes - 1) / nodes / (cluster.node_bytes_per_s * cluster.efficiency)
