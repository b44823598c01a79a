"""A recipe from a stranger: it reads nothing, runs nothing, and cannot exhaust the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mpt.errors import RecipeError
from mpt.recipe.budget import n_parameters
from mpt.recipe.load import loads

TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_text(encoding="utf-8")
SECRET = "correct-horse-battery"


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,x}",
        "${ oc.env : SECRET }",
        "a${seed}${oc.env:SECRET}",
        "${oc.env:${run}}",
        "${${seed}}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.create:{a: 1}}",
        "${oc.select:seed}",
        "$${seed}{oc.env:SECRET}",
        "\\${oc.env:SECRET}",
        "${seed:}",
    ],
)
def test_no_resolver_ever_runs(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    for key in ("run", "tokenizer.path", "data.streams.stdlib.path"):
        said = refusal(TINY, f"{key}={value}")
        assert SECRET not in said
        assert said.startswith(f"command line: {key}: ")


def test_a_resolver_is_refused_by_name() -> None:
    said = refusal(TINY.replace("run: tiny", "run: ${oc.env:HOME}"))
    assert said == (
        "r.yaml:3:6: run: the resolver `oc.env` is off: a recipe cannot run or read anything."
    )


def test_references_cannot_be_put_together_into_a_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    parts = ['tokenizer.path="$"', 'data.eval.path="{oc.env:SECRET}"']
    joined = "data.streams.stdlib.path=${tokenizer.path}${data.eval.path}"
    said = refusal(TINY, *parts, joined, "prepare.source=${data.streams.stdlib.path}")
    assert SECRET not in said
    assert "data.streams.stdlib.path: its references put together make a new reference." in said


@pytest.mark.parametrize(
    "tagged",
    [
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system",
        "!foo x",
        "!!str 5",
        "! x",
        "!!binary aGk=",
        "!!set {a}",
    ],
)
def test_a_tag_is_refused(tagged: str) -> None:
    (line,) = refusal(TINY.replace("run: tiny", f"run: {tagged}")).splitlines()
    assert line.startswith("r.yaml:3:6: run: the tag '!")
    assert line.endswith(" is not allowed; write a plain value.")


def test_a_tag_on_the_root_or_on_a_key_is_refused() -> None:
    assert "the tag '!foo' is not allowed" in refusal("!foo\na: b")
    assert "the tag '!foo' on a key is not allowed" in refusal(TINY + "!foo a: b")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/x", "..", ".hidden", "", "a b", "a\\b", "-rf", "x" * 129]
)
def test_a_run_name_cannot_leave_its_directory(name: str) -> None:
    assert ": run: " in refusal(TINY, f"run='{name}'")


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", ".."])
def test_a_stream_name_cannot_be_a_path(name: str) -> None:
    text = TINY.replace("stdlib: {path", f'"{name}": {{path')
    assert "is not a key" in refusal(text)


@pytest.mark.parametrize(
    "escape", ["\\0", "\\n", "\\e[31m", "\\x7f", "\\N", "\\L", "\\uD800", "\\uFFFE"]
)
def test_no_value_can_hold_a_control_character(escape: str) -> None:
    said = refusal(TINY.replace("{path: data/stdlib/tok", f'{{path: "a{escape}", x: tok'))
    assert said.isprintable() or said.replace("\n", "").isprintable()
    assert "tokenizer.path: 'a\\" in said
    assert "has the control character" in said


def aliases(opening: str, closing: str, name: str) -> str:
    rows = [f"a0: &a0 {opening}{closing}"]
    for i in range(9):
        cells = ", ".join(f"{name.format(j)}*a{i}" for j in range(9))
        rows.append(f"a{i + 1}: &a{i + 1} {opening}{cells}{closing}")
    return "\n".join(rows)


MANY = range(5_000)
BOMBS = {
    "aliases of lists": aliases("[", "]", ""),
    "aliases of mappings": aliases("{", "}", "k{}: "),
    "an alias of itself": "a: &a [*a]",
    "brackets": "[" * 900_000,
    "braces": "{a: " * 200_000,
    "dashes": "- " * 400_000,
    "question marks": "? " * 400_000,
    "a long comment": "#" * 900_000,
    "a long word": f"a: {'b' * 900_000}",
    "a long number": f"a: {'9' * 900_000}",
    "a long version": f"%YAML 1.{'9' * 5000}\n---\na: 1",
    "a character beyond Unicode": 'a: "\\UFFFFFFFF"',
    "many keys": "\n".join(f"{'k' * 55}{i}: 1" for i in MANY),
    "many near misses": TINY + "\n".join(f"optimize{i}: 1" for i in MANY),
    "many values": "a: [" + "1," * 20_000 + "1]",
    "references that grow": "a0: x\n"
    + "\n".join(f"a{i + 1}: {f'${{a{i}}}' * 9}" for i in range(30)),
    "references to nothing that grow": "a0: ''\n"
    + "\n".join(f"a{i + 1}: {f'${{a{i}}}' * 9}" for i in range(30)),
    "sections of references": "a: 1\n" + "\n".join(f"b{i}: ${{a}}" for i in MANY),
    "a chain of references": "\n".join(f"a{i}: ${{a{i + 1}}}" for i in MANY),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_quickly(bomb: str) -> None:
    start = time.process_time()
    assert len(refusal(BOMBS[bomb])) < 100_000
    assert time.process_time() - start < 5.0


def test_the_limits_are_named() -> None:
    assert "nested more than 50 levels deep" in refusal(BOMBS["brackets"])
    assert "more than 10000 values, aliases written out" in refusal(BOMBS["aliases of lists"])
    assert "more than 1000 references" in refusal(BOMBS["sections of references"])
    many = "[" + "1, " * 6000 + "]"
    assert "more than 10000 values with the overrides" in refusal(TINY, f"x={many}", f"y={many}")
    long = "x" * 3000
    grown = refusal(
        TINY, f"tokenizer.path={long}", "data.eval.path=${tokenizer.path}${tokenizer.path}"
    )
    assert "data.eval.path: grows to more than 4096 characters." in grown
    assert "a chain of more than 20 references" in refusal(BOMBS["a chain of references"])


@pytest.mark.parametrize("number", ["9" * 4000, "1e400", "-1e400", "1" * 30, "1e-400", "0" * 4000])
def test_a_number_too_large_for_the_machine_is_a_problem_not_a_crash(number: str) -> None:
    for key in ("seed", "optimizer.lr", "model.d_model"):
        assert refusal(TINY, f"{key}={number}").startswith(f"command line: {key}: '")


def test_the_largest_numbers_of_each_type_are_only_arithmetic() -> None:
    huge = str(2**63 - 1)
    keys = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "expansion_ratio")
    got = loads(TINY, "r", [f"model.{key}={huge}" for key in keys])
    assert n_parameters(got.model) > 2**189
