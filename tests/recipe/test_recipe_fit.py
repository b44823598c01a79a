"""What `auto` comes to on a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.recipe.activations import activation_bytes
from mpt.recipe.budget import state_bytes_per_rank
from mpt.recipe.fit import COMPILE_PAYS_FLOPS, MEMORY_SHARE, Fit, Machine, fit
from mpt.recipe.load import load
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
