"""`key=value` on the command line, and `${key}` inside a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt.errors import RecipeError
from mpt.recipe.data import Stream
from mpt.recipe.load import loads

TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_text(encoding="utf-8")


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads(TINY, "r.yaml", overrides)
    return str(caught.value)


def test_an_override_equals_writing_it_in_the_file() -> None:
    text = TINY.replace("lr: 1.0e-3", "lr: 3e-4").replace("steps: 300", "steps: 50")
    assert loads(TINY, "r", ["train.steps=50", "optimizer.lr=3e-4"]) == loads(text, "r")


def test_the_last_override_of_a_key_wins() -> None:
    assert loads(TINY, "r", ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_set_a_list_a_section_or_null() -> None:
    assert loads(TINY, "r", ["optimizer.betas=[0.9, 0.99]"]).optimizer.betas == (0.9, 0.99)
    assert loads(TINY, "r", ["eval={every_steps: 5}"]).eval.every_steps == 5
    assert loads(TINY, "r", ["prepare=null"]).prepare is None


def test_an_override_may_add_what_the_file_has_not() -> None:
    got = loads(TINY, "r", ["prepare=null", "data.streams.b.path=s3://b/c=d", "launch.nproc=2"])
    assert got.data.streams["b"] == Stream(path="s3://b/c=d")
    assert got.launch.nproc == 2


def test_an_override_may_fill_in_what_was_null() -> None:
    got = loads(TINY, "r", ["prepare=null", "prepare.source=text"])
    assert got.prepare is not None
    assert got.prepare.source == "text"


def test_an_override_changes_nothing_but_its_key_where_a_section_is_repeated() -> None:
    text = TINY.replace("eval: {every", "eval: &often {every")
    text = text.replace("checkpoint: {every_steps: 100, keep: 3}", "checkpoint: *often")
    got = loads(text, "r", ["checkpoint.every_steps=5"])
    assert (got.eval.every_steps, got.checkpoint.every_steps) == (100, 5)


def test_a_bare_value_is_taken_word_for_word() -> None:
    got = loads(TINY, "r", ["tokenizer.path=a: b #c", "data.eval.path=*x"])
    assert got.tokenizer.path == "a: b #c"
    assert got.data.eval is not None
    assert got.data.eval.path == "*x"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=", "optimizer.lr: the value is missing; write optimizer.lr=VALUE, or null"),
        ("optimizer.lr= ", "optimizer.lr: the value is missing; write optimizer.lr=VALUE, or null"),
        ("optimizer.lr=null", "optimizer.lr: has no value; it needs a number."),
        ("+seed=3", "`+` is not part of an override here; write KEY=VALUE"),
        ("~seed", "`~` is not part of an override here; write KEY=VALUE"),
        ("seed", "is not KEY=VALUE; write it like `train.steps=100`."),
        ("=3", "its left side is not a dotted key; write it like `optimizer.lr=1e-3`"),
        ("optimizer.betas[0]=3", "its left side is not a dotted key; write it like"),
        ("seed.x=3", "seed.x: there is no `x` below a value that has no keys."),
        ("optimizer.betas=[1", "optimizer.betas: cannot be read as YAML: expected ',' or ']'"),
        ("model.n_heads=010", "model.n_heads: '010' is not a whole number; leading zeros"),
        ("model.n_heads=1:30", "model.n_heads: '1:30' is not a whole number; write one plain"),
        ("data.streams=5", "data.streams: 5 is not a section of keys."),
    ],
)
def test_a_wrong_override_is_quoted_back(override: str, said: str) -> None:
    line = refusal(override)
    assert line.startswith(f"command line: {said}")
    assert line.endswith(f" (given as `{override}`)")


def test_problems_of_the_command_line_come_after_those_of_the_file_in_its_order() -> None:
    text = TINY.replace("seed: 17", "seed: x")
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", ["train.steps=b", "eval.every_steps=a"])
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "seed",
        "train.steps",
        "eval.every_steps",
    ]


def test_a_reference_takes_value_and_type_of_what_it_names() -> None:
    text = TINY.replace("eval: {every_steps: 100}", 'eval: {every_steps: "${checkpoint.keep}"}')
    text = text.replace("run: tiny", "run: t-${seed}-${optimizer.lr}")
    got = loads(text, "r", ["checkpoint.keep=${model.n_layers}"])
    assert got.eval.every_steps == got.checkpoint.keep == 6
    assert got.run == "t-17-0.001"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=${sed}", "${sed} refers to a key that this recipe does not set."),
        ("seed=${seed}", "the references go in a circle: seed -> seed."),
        ("seed=${tokenizer.path}", "${tokenizer.path} has no value yet."),
        ("seed=${model}", "${model} is a whole section; refer to a single value."),
        ("seed=${run}", "'tiny' is not a whole number."),
        ("run=a-${prepare.text_key}", "${prepare.text_key} refers to a key that this recipe"),
        ("run=${ seed }", "`${ seed }` is not a plain reference; only `${section.key}` is."),
        ("run=${.seed}", "`${.seed}` is not a plain reference; only `${section.key}` is."),
        ("run=${seed", "`${seed` is not a plain reference; only `${section.key}` is."),
        ("run=\\${seed}", "`\\${seed}` is not a plain reference; only `${section.key}` is."),
    ],
)
def test_a_reference_that_cannot_be_filled_in_says_why(override: str, said: str) -> None:
    assert refusal("tokenizer.path=???", override).startswith(
        f"command line: {override.split('=')[0]}: {said}"
    )


def test_a_broken_reference_is_reported_once_not_by_all_that_lean_on_it() -> None:
    lines = refusal("seed=${nope}", "eval.every_steps=${seed}", "checkpoint.keep=${seed}")
    assert lines.count("\n") == 0


def test_a_circle_of_references_is_reported_once() -> None:
    lines = refusal("seed=${train.steps}", "train.steps=${eval.samples}", "eval.samples=${seed}")
    assert "seed -> train.steps -> eval.samples -> seed" in lines
    assert lines.count("\n") == 0


def test_only_text_and_numbers_become_part_of_a_text() -> None:
    said = "neither text nor a number"
    assert said in refusal("data.shuffle=true", "run=a${data.shuffle}")
    assert said in refusal("data.eval=null", "run=a${data.eval}")
