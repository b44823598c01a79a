"""Laws of the search for a size of microbatch, on machines made of arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.recipe.fit import Fit, Machine, fit
from mpt.recipe.load import load
from mpt.recipe.probing import (
    MEMORY_LIMIT,
    MOST_TRIED,
    PROBE_SHARE,
    ROUNDS,
    Tried,
    fastest,
    next_size,
    probe_pays,
)
from mpt.recipe.recipe import Recipe

TINY = load(Path(__file__).parents[2] / "recipes" / "tiny.yaml")
CPU = Machine(device="cpu", memory_bytes=16 << 30, has_bf16=True, has_compiler=True)
GPU = replace(CPU, device="cuda", memory_bytes=80 << 30)

Cost = Callable[[int], float]


def search(
    cost: Cost, *, first: int, share: int, memory: int = 1000, taken: Callable[[int], int] | None
) -> list[Tried]:
    """Try sizes until there is nothing more to gain; `taken` are the bytes that a size takes."""
    tried: list[Tried] = []
    while size := next_size(tried, first, share, memory):
        tried.append(
            Tried(
                microbatch_size=size,
                step_s=cost(size),
                resident_bytes=None if taken is None else taken(0),
                peak_bytes=None if taken is None else taken(size),
            )
        )
        assert len(tried) <= MOST_TRIED
    return tried


def sizes(tried: list[Tried]) -> list[int]:
    return [each.microbatch_size for each in tried]


def test_the_fastest_is_found_where_smaller_is_faster() -> None:
    tried = search(lambda size: abs(size - 4), first=32, share=32, taken=None)
    assert sizes(tried) == [32, 16, 8, 4, 2]
    assert fastest(tried, 1000).microbatch_size == 4


def test_one_smaller_size_is_enough_where_larger_is_faster() -> None:
    tried = search(lambda size: 1 / size, first=32, share=32, taken=None)
    assert sizes(tried) == [32, 16]
    assert fastest(tried, 1000).microbatch_size == 32


def test_without_a_measure_of_memory_nothing_is_larger_than_the_estimate() -> None:
    assert max(sizes(search(lambda size: 1 / size, first=4, share=64, taken=None))) == 4


def test_with_one_it_grows_as_long_as_what_was_measured_says_that_it_fits() -> None:
    tried = search(lambda size: 1 / size, first=4, share=64, taken=lambda size: 100 + 20 * size)
    assert sizes(tried) == [4, 8, 16, 32], "64 would take 1,380 of 850"
    assert fastest(tried, 1000).microbatch_size == 32


def test_what_was_seen_not_to_fit_is_not_taken_however_fast() -> None:
    tried = search(lambda size: 1 / size, first=8, share=8, taken=lambda size: 500 + 100 * size)
    assert sizes(tried) == [8, 4, 2, 1]
    assert fastest(tried, 1000).microbatch_size == 2


@given(
    share=st.integers(1, 200),
    first=st.integers(1, 200),
    a_sample=st.integers(1, 60),
    resident=st.integers(0, 400),
    fixed=st.integers(0, 100),
    measured=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_size_above_the_first_is_tried_that_does_not_fit(
    share: int,
    first: int,
    a_sample: int,
    resident: int,
    fixed: int,
    measured: bool,
    seed: int,
) -> None:
    first = min(first, share)
    speeds = random.Random(seed).choices(range(1, 1000), k=201)

    def taken(size: int) -> int:
        return resident + (fixed + a_sample * size if size else 0)

    tried = search(
        lambda size: speeds[size], first=first, share=share, taken=taken if measured else None
    )
    assert sizes(tried)[0] == first
    assert len(set(sizes(tried))) == len(tried), "no size twice"
    for size in sizes(tried):
        n = -(-share // size)
        assert size == first or size == -(-share // n), "as equal as can be"
        assert size <= first or taken(size) <= MEMORY_LIMIT * 1000


def with_train(**changes: Any) -> Recipe:
    return replace(TINY, train=replace(TINY.train, **changes))


def pays(recipe: Recipe, machine: Machine = CPU, world_size: int = 1) -> bool:
    chosen: Fit = fit(recipe, machine, world_size)
    return probe_pays(recipe, machine, chosen, world_size)


def test_a_short_run_is_not_held_up_by_a_probe() -> None:
    assert not pays(TINY)
    # At worst two sizes' worth of samples, in passes with and without reduction.
    steps = int(2 * 2 * (1 + ROUNDS) / PROBE_SHARE)
    assert pays(with_train(steps=steps, compile=False))
    assert not pays(with_train(steps=steps - 1, compile=False))
    assert not pays(with_train(steps=steps, compile=True)), "each size would be compiled"


def test_nothing_is_timed_where_nothing_is_left_to_choose() -> None:
    long = with_train(steps=10**7)
    assert pays(long)
    assert not pays(with_train(steps=10**7, microbatch_size=4))
    assert not pays(long, world_size=16), "a share of one sample"


@pytest.mark.parametrize(
    ("name", "paid"), [("mpt-125m", False), ("mpt-1b", True), ("mpt-7b", True)]
)
def test_on_gpus_it_pays_for_large_models(name: str, paid: bool) -> None:
    recipe = load(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    recipe = replace(recipe, train=replace(recipe.train, microbatch_size="auto"))
    world_size = 8 * recipe.launch.max_nodes
    assert pays(recipe, GPU, world_size) == paid
