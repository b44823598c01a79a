"""What a word in a recipe means, and what a good recipe turns into."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt import recipe
from mpt.errors import RecipeError
from mpt.recipe import scalar
from mpt.recipe.data import Stream
from mpt.recipe.load import loads

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_text(encoding="utf-8")


def same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0", 0),
        ("-17", -17),
        ("+8", 8),
        ("1_000_000", 1_000_000),
        (str(2**63 - 1), 2**63 - 1),
        ("1e-3", 1e-3),
        ("1.0E+3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-0.0", -0.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_a_plain_word_means_what_it_looks_like(text: str, meaning: object) -> None:
    assert same(scalar.read(text), meaning)


@pytest.mark.parametrize(
    "text",
    [
        *("010", "-01", "00", "1:30", "0x10", "0o7", "0b1", "1_0", "1__000", "_1", "1,000"),
        *("yes", "no", "on", "off", "True", "FALSE", "Null", "inf", "nan", "1e400", "1e-400"),
        *("1e", "e5", ".", "-", "+-1", "1.2.3", "2026-11-01", "٣", str(2**63), "9" * 5000),
    ],
)
def test_what_yaml_readers_disagree_about_stays_text(text: str) -> None:
    assert same(scalar.read(text), text)


@given(st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1))
def test_every_number_survives_its_own_spelling(number: float) -> None:
    spelled = f".{number}" if number == math.inf else repr(number).replace("-inf", "-.inf")
    assert same(scalar.read(spelled), number)


@given(st.text(max_size=80), st.sets(st.sampled_from([int, float, bool, str])))
def test_a_hint_never_fails_whatever_the_text(text: str, wanted: set[type]) -> None:
    assert isinstance(scalar.hint(text, wanted), str)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert recipe.load(path).run == path.stem


def test_the_recipe_of_the_contract_means_what_it_says() -> None:
    tiny = loads(TINY, "tiny.yaml")
    assert tiny.data.streams == {"stdlib": Stream(path="data/stdlib/train", weight=1.0)}
    assert same(tiny.optimizer.lr, 1e-3)
    assert tiny.optimizer.betas == (0.9, 0.95)
    assert tiny.train.microbatch_size == "auto"
    assert tiny.launch.nproc == "auto"


def test_a_whole_number_is_a_float_where_a_float_goes() -> None:
    assert same(loads(TINY, "r", ["train.max_grad_norm=1"]).train.max_grad_norm, 1.0)


def test_a_union_takes_each_of_its_kinds() -> None:
    for value, meaning in [("4", 4), ("auto", "auto")]:
        got = loads(TINY, "r", [f"train.microbatch_size={value}"]).train.microbatch_size
        assert same(got, meaning)
    for value, wanted in [("true", True), ("false", False), ("auto", "auto")]:
        assert same(loads(TINY, "r", [f"train.compile={value}"]).train.compile, wanted)


def test_line_endings_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())
    assert recipe.load(path) == loads(TINY, "r")
    path.write_bytes(b"\xef\xbb\xbfx: 1")
    with pytest.raises(RecipeError, match=r"r\.yaml:1:1: x: unknown key"):
        recipe.load(path)


def test_an_alias_repeats_what_its_anchor_holds() -> None:
    text = TINY.replace("eval: {every_steps: 100}", "eval: {every_steps: &often 7}")
    text = text.replace("{every_steps: 100, keep: 3}", "{every_steps: *often, keep: 3}")
    assert loads(text, "r").checkpoint.every_steps == 7
    changed = loads(text, "r", ["eval.every_steps=9"])
    assert (changed.eval.every_steps, changed.checkpoint.every_steps) == (9, 7)
