"""What `auto` comes to on a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import UsageError
from mpt.recipe.activations import activation_bytes
from mpt.recipe.budget import kept_gathered_bytes, state_bytes_per_rank, whole_gradient_bytes
from mpt.recipe.fit import COMPILE_PAYS_FLOPS, MEMORY_SHARE, Fit, Machine, at_size, fit
from mpt.recipe.load import load
from mpt.recipe.premises import premises, recalled
from mpt.recipe.recipe import Recipe

TINY = load(Path(__file__).parents[2] / "recipes" / "tiny.yaml")
CPU = Machine(device="cpu", memory_bytes=16 << 30, has_bf16=True, has_compiler=True)
GPU = replace(CPU, device="cuda", memory_bytes=80 << 30)


def with_train(**changes: Any) -> Recipe:
    return replace(TINY, train=replace(TINY.train, **changes))


def with_room_for(how: Any, recipe: Recipe = TINY, machine: Machine = CPU) -> Machine:
    """A machine on which a sample just fits when blocks make `how` much again."""
    attention = fit(recipe, machine, 1).attention.backend
    needed = activation_bytes(recipe.model, 1, "bf16", attention, how)
    needed += state_bytes_per_rank(recipe.model, 1)
    return replace(machine, memory_bytes=int(needed / MEMORY_SHARE) + 2)


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_the_least_is_made_again_with_which_a_sample_fits(how: str, machine: Machine) -> None:
    tight = with_room_for(how, machine=machine)
    assert fit(TINY, tight, 1).recompute == how
    assert fit(TINY, tight, 1).microbatch_size == 1
    smaller = replace(tight, memory_bytes=tight.memory_bytes - 8)
    follows = {"none": "selective", "selective": "full", "full": "full"}[how]
    assert fit(TINY, smaller, 1).recompute == follows


def test_what_the_recipe_says_by_name_is_taken() -> None:
    cramped = replace(CPU, memory_bytes=1)
    wanted = with_train(
        precision="fp32",
        attention="sdpa",
        activation_checkpointing="none",
        microbatch_size=3,
        compile=True,
    )
    got = fit(wanted, cramped, 1)
    assert (got.precision, got.attention.backend, got.recompute) == ("fp32", "sdpa", "none")
    assert (got.microbatch_size, got.compile) == (3, True)


def test_a_microbatch_is_no_more_than_a_ranks_share() -> None:
    assert fit(with_train(microbatch_size=99), CPU, 3).microbatch_size == 6
    assert fit(TINY, CPU, 1).microbatch_size == 16
    assert fit(TINY, CPU, 16).microbatch_size == 1


def test_precision_follows_the_hardware() -> None:
    assert fit(TINY, CPU, 1).precision == "bf16"
    assert fit(TINY, replace(CPU, has_bf16=False), 1).precision == "fp32"


def test_compiling_must_pay() -> None:
    per_step = 16 * 256 * 6 * 2.6e6
    long = with_train(steps=int(2 * COMPILE_PAYS_FLOPS / per_step))
    assert fit(TINY, GPU, 1).compile
    assert not fit(TINY, CPU, 1).compile
    assert fit(long, CPU, 1).compile
    assert not fit(long, replace(CPU, has_compiler=False), 1).compile


def test_a_choice_can_be_logged() -> None:
    chosen: Fit = fit(TINY, CPU, 1)
    assert chosen.to_json() == {
        "precision": "bf16",
        "attention": "blocks",
        "recompute": "none",
        "microbatch_size": 16,
        "compile": False,
        "replicas": 1,
        "reshard_after_forward": False,
        "reduce_gradients": "once",
        "float8": "off",
    }


def room_beside(recipe: Recipe, size: int, *, n_shards: int, more: int = 0) -> Machine:
    """A GPU on which microbatches of `size` fit, and `more` bytes beside them."""
    attention = fit(recipe, GPU, 1).attention.backend
    needed = activation_bytes(recipe.model, size, "bf16", attention, "none") + more
    needed += state_bytes_per_rank(recipe.model, n_shards)
    return replace(GPU, memory_bytes=int(needed / MEMORY_SHARE) + 2)


WHOLE = kept_gathered_bytes(TINY.model, "bf16")


@pytest.mark.parametrize("world_size", [1, 4])
def test_weights_stay_gathered_where_they_fit(world_size: int) -> None:
    recipe = with_train(microbatch_size=2)
    enough = room_beside(recipe, 2, n_shards=world_size, more=WHOLE)
    assert not fit(recipe, enough, world_size).reshard_after_forward
    less = replace(enough, memory_bytes=enough.memory_bytes - 8)
    assert fit(recipe, less, world_size).reshard_after_forward
    for by_name in (True, False):
        told = with_train(microbatch_size=2, reshard_after_forward=by_name)
        assert fit(told, less, world_size).reshard_after_forward == by_name


def test_on_a_single_rank_gathered_weights_come_before_larger_microbatches() -> None:
    tight = room_beside(TINY, 4, n_shards=1)
    chosen = fit(TINY, tight, 1)
    assert not chosen.reshard_after_forward
    assert chosen.microbatch_size < 4
    shared = fit(with_train(global_batch_size=64), room_beside(TINY, 4, n_shards=4), 4)
    assert (shared.reshard_after_forward, shared.microbatch_size) == (True, 4)


def test_whole_gradients_are_summed_up_where_they_fit_and_are_more_than_one() -> None:
    recipe = with_train(microbatch_size=1, reshard_after_forward=True)
    gradients = whole_gradient_bytes(recipe.model, 4)
    enough = room_beside(recipe, 1, n_shards=4, more=gradients)
    less = replace(enough, memory_bytes=enough.memory_bytes - 8)
    assert fit(recipe, enough, 4).reduce_gradients == "once"
    assert fit(recipe, less, 4).reduce_gradients == "each"
    assert fit(recipe, less, 16).reduce_gradients == "once", "one microbatch a step"
    assert at_size(fit(recipe, less, 4), recipe, less, 4, 4).reduce_gradients == "once"


def test_copies_of_the_model_are_one_a_node_where_its_gpus_hold_the_state() -> None:
    auto = with_train(replicas="auto", microbatch_size=1)
    node = room_beside(auto, 1, n_shards=4)
    in_nodes = replace(node, ranks_per_node=4)
    assert fit(auto, in_nodes, 16).replicas == 4
    assert fit(auto, replace(in_nodes, memory_bytes=in_nodes.memory_bytes - 8), 16).replicas == 1
    assert fit(auto, in_nodes, 4).replicas == 1, "a single node"
    assert fit(auto, in_nodes, 14).replicas == 1, "nodes that are not alike"
    assert fit(auto, node, 16).replicas == 1, "a GPU a node: nothing near to share with"
    assert fit(auto, replace(CPU, ranks_per_node=4), 16).replicas == 1
    assert fit(with_train(replicas=2), in_nodes, 16).replicas == 2
    assert fit(TINY, in_nodes, 16).replicas == 1, "plain FSDP unless it is asked for"


def test_copies_must_divide_the_workers() -> None:
    with pytest.raises(UsageError, match=r"train\.replicas: 3 does not divide the 4 workers"):
        fit(with_train(replicas=3), GPU, 4)


HOPPER = replace(GPU, has_float8=True, torchao_installed=True)


@pytest.mark.parametrize(
    ("machine", "train", "why"),
    [
        (CPU, {}, "runs on GPUs alone"),
        (replace(HOPPER, has_float8=False), {}, "compute capability 8.9"),
        (replace(HOPPER, torchao_installed=False), {}, "needs the package torchao"),
        (HOPPER, {"precision": "fp32"}, "precision is fp32"),
    ],
)
def test_products_in_8_bits_are_refused_with_the_reason(
    machine: Machine, train: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=f"train.float8: rowwise .*{why}"):
        fit(with_train(float8="rowwise", **train), machine, 1)


def test_products_in_8_bits_are_never_chosen_but_taken_by_name() -> None:
    assert fit(TINY, HOPPER, 1).float8 == "off"
    assert fit(with_train(float8="tensorwise"), HOPPER, 1).float8 == "tensorwise"
    odd = replace(TINY.model, d_model=24, n_heads=3)
    wanted = replace(with_train(float8="rowwise", attention="sdpa"), model=odd)
    with pytest.raises(UsageError, match="multiples of 16; 24 is not"):
        fit(wanted, HOPPER, 1)


def test_what_a_recipe_says_itself_is_not_recalled_otherwise() -> None:
    asked = with_train(precision="bf16")
    chosen = fit(asked, CPU, 1)
    with pytest.raises(ValueError, match="precision is 'fp32', which is not what the recipe says"):
        recalled(chosen, {**chosen.to_json(), "precision": "fp32"}, asked, 1)
    with pytest.raises(ValueError, match="float8"):
        recalled(chosen, {**chosen.to_json(), "float8": "tensorwise"}, asked, 1)


def test_a_choice_hangs_on_the_optimizer() -> None:
    muon = replace(TINY, optimizer=replace(TINY.optimizer, name="muon"))
    assert premises(muon, CPU, 1) != premises(TINY, CPU, 1)


def test_a_choice_is_recalled_as_it_was_and_nothing_else_passes_for_one() -> None:
    chosen = fit(TINY, CPU, 1)
    other = replace(chosen, microbatch_size=3, recompute="full", reduce_gradients="each")
    assert recalled(chosen, other.to_json(), TINY, 1).to_json() == other.to_json()
    for key, bad in [
        ("microbatch_size", 17),
        ("microbatch_size", 0),
        ("microbatch_size", True),
        ("compile", 1),
        ("attention", "magic"),
        ("replicas", 2),
        ("more", 1),
    ]:
        with pytest.raises(ValueError, match=f"{key} is|not a choice"):
            recalled(chosen, {**other.to_json(), key: bad}, TINY, 1)


def test_premises_are_equal_on_equal_machines_alone() -> None:
    here = premises(TINY, CPU, 2)
    rebooted = replace(CPU, memory_bytes=CPU.memory_bytes - 4096)
    assert premises(TINY, rebooted, 2) == here
    for other in (
        premises(TINY, CPU, 3),
        premises(TINY, replace(CPU, memory_bytes=8 << 30), 2),
        premises(TINY, replace(CPU, name="another"), 2),
        premises(with_train(attention="sdpa"), CPU, 2),
        premises(replace(TINY, model=replace(TINY.model, d_model=96)), CPU, 2),
    ):
        assert other != here
