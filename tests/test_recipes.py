"""The shipped recipes: they load, and what their heads say is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpt import recipe
from mpt.recipe.budget import Plan, n_parameters, plan
from mpt.recipe.fit import Machine, beside_bytes, fit
from mpt.recipe.recipe import Recipe
from mpt.recipe.shipped import shipped_recipes
from mpt.recipe.unusual import unusual

RECIPES = Path(__file__).parents[1] / "recipes"
GIB = 1 << 30

# The released MPT-7B and MPT-30B count 6,649,286,656 and 29,957,200,896 parameters; with 56 heads,
# as llm-foundry's 30b has it, the count is the same.
PARAMETERS = {
    "mpt-125m": 123_685_632,
    "mpt-350m": 353_682_432,
    "mpt-760m": 757_016_064,
    "mpt-1b": 1_311_344_640,
    "mpt-3b": 2_645_854_720,
    "mpt-7b": 6_649_286_656,
    "mpt-13b": 12_841_538_560,
    "mpt-30b": 29_957_200_896,
    "mpt-70b": 64_838_967_296,
    "mpt-7b-storywriter": 6_649_286_656,
}
# llm-foundry's pretraining recipes: peak learning rate, samples a step, steps.
PUBLISHED = {
    "mpt-125m": (6.0e-4, 256, 4_800),
    "mpt-350m": (3.0e-4, 256, 13_400),
    "mpt-760m": (2.5e-4, 256, 29_000),
    "mpt-1b": (2.0e-4, 512, 24_800),
    "mpt-3b": (1.6e-4, 512, 51_500),
    "mpt-7b": (1.2e-4, 1_024, 63_900),
    "mpt-13b": (1.0e-4, 1_024, 124_000),
    "mpt-30b": (1.0e-4, 2_048, 143_100),
    "mpt-70b": (8.0e-5, 2_048, 333_800),
}
MEMORY = (
    r"Memory of each of ([\d,]+) GPUs, predicted, not measured: "
    r"([\d.]+) GiB, ([\d.]+) of them state\."
)
STORYWRITER = "mpt-7b-storywriter"


def shipped(name: str) -> Recipe:
    return recipe.load(RECIPES / f"{name}.yaml")


def head(name: str) -> str:
    """Return the comment that a recipe begins with, as one line."""
    lines = shipped_recipes()[name].splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:first])


def said(name: str, pattern: str) -> tuple[str, ...]:
    """Return what the head says where `pattern` is, without commas in numbers."""
    found = re.search(pattern, head(name))
    assert found, f"{name}: the head does not say {pattern}"
    return tuple(group.replace(",", "") for group in found.groups())


def on_its_cluster(name: str) -> Plan:
    """Return the plan for the GPUs that the recipe asks for, of 80 GB each, without flash-attn."""
    cfg = shipped(name)
    assert isinstance(cfg.launch.nproc, int)
    world_size = cfg.launch.nproc * cfg.launch.max_nodes
    gpu = Machine(device="cuda", memory_bytes=80 * 10**9, has_bf16=True, has_compiler=True)
    chosen = fit(cfg, gpu, world_size)
    beside = beside_bytes(chosen, cfg, world_size)
    attention = chosen.attention.backend
    return plan(cfg, world_size, attention, chosen.recompute, chosen.replicas, beside)


def test_these_are_all() -> None:
    assert set(shipped_recipes()) == {"tiny", *PARAMETERS}


@pytest.mark.parametrize("name", [*PARAMETERS, "tiny"])
def test_a_recipe_has_the_name_of_its_file_and_says_what_it_is(name: str) -> None:
    assert shipped(name).run == name
    first, second = shipped_recipes()[name].splitlines()[:2]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 100
    assert second == f"#   mpt train recipes/{name}.yaml"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_released_models(name: str) -> None:
    model = shipped(name).model
    assert n_parameters(model) == PARAMETERS[name]
    assert said(name, r"Parameters: ([\d,]+)\.") == (str(PARAMETERS[name]),)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_are_as_released_but_for_what_keeps_them_stable(name: str) -> None:
    keys = {line.partition(":")[0] for line in unusual(shipped(name).model)}
    stable = {"clip_qkv", "init_config.name", "init_config.emb_init_std"}
    assert keys == stable | ({"alibi_bias_max"} if name == STORYWRITER else set())
    assert shipped("mpt-30b").model.n_heads == 64


@pytest.mark.parametrize("name", PUBLISHED)
def test_rate_batch_and_steps_are_the_published_ones(name: str) -> None:
    cfg = shipped(name)
    got = (cfg.optimizer.lr, cfg.train.global_batch_size, cfg.train.steps)
    assert got == PUBLISHED[name]
    assert cfg.optimizer.betas == (0.9, 0.95)
    assert (cfg.schedule.name, cfg.schedule.final) == ("cosine", 0.1)
    share = cfg.schedule.warmup_steps / cfg.train.steps
    said = re.search(
        r"warm-up was a tenth of the run, and here it is ([\d.]+)%", shipped_recipes()[name]
    )
    assert share == pytest.approx(float(said[1]) / 100, abs=5e-4) if said else 0.09 < share <= 0.1
    assert 19.5 < on_its_cluster(name).total_tokens / PARAMETERS[name] < 22


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_embedding_begins_as_in_the_released_models(name: str) -> None:
    model = shipped(name).model
    assert model.init_config.emb_init_std == pytest.approx((2 / model.d_model) ** 0.5, abs=6e-6)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_in_the_head_are_those_of_the_run(name: str) -> None:
    cfg, found = shipped(name), on_its_cluster(name)
    *factors, total = said(
        name, r"Tokens: ([\d,]+) steps x ([\d,]+) samples x ([\d,]+) = ([\d,]+)\."
    )
    shape = (cfg.train.steps, cfg.train.global_batch_size, cfg.model.max_seq_len)
    assert tuple(map(int, factors)) == shape
    assert int(total) == found.total_tokens
    (tokens, unit) = said(name, r"([\d.]+)([BT]) tokens")
    digits = len(tokens.partition(".")[2])
    assert float(tokens) == round(found.total_tokens / {"B": 1e9, "T": 1e12}[unit], digits)


@pytest.mark.parametrize("name", PARAMETERS)
def test_memory_in_the_head_is_what_the_arithmetic_predicts(name: str) -> None:
    found = on_its_cluster(name)
    gpus, whole, state = said(name, MEMORY)
    assert int(gpus) == found.world_size
    assert float(whole) == round(found.memory_bytes_per_rank / GIB, 1)
    assert float(state) == round(found.state_bytes_per_rank / GIB, 1)
    assert found.memory_bytes_per_rank < 0.6 * 80e9, "the rest is for what the estimate leaves out"
    again = {"selective": "Activations are partly made again", "full": "Activations are made again"}
    assert again.get(found.recompute, "") in head(name)
    nodes = shipped(name).launch.max_nodes
    assert ("one node of 8 GPUs" if nodes == 1 else f"{nodes} nodes of 8 GPUs") in head(name)
    assert found.samples_per_step % (found.world_size * found.microbatch_size) == 0, "no padding"


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_export_to_transformers_but_for_what_it_would_take_for_something_else(
    name: str,
) -> None:
    from mpt.hf.config import unsupported

    reasons = unsupported(shipped(name).model)
    if name == STORYWRITER:
        assert any("alibi_bias_max" in reason for reason in reasons)
    else:
        assert reasons == []
