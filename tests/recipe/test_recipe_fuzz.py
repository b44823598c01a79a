"""A damaged recipe gives a Recipe or a RecipeError: never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mpt import recipe
from mpt.errors import RecipeError

TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_bytes()

NASTY = [
    *(
        b"",
        b"~",
        b"null",
        b"010",
        b"0x10",
        b"1:30",
        b"yes",
        b"eight",
        b"-1",
        b"0",
        b"1.5",
        b"1e400",
    ),
    *(b".nan", b".inf", b"-.inf", b"9" * 5000, b"9223372036854775808", b"[]", b"{}", b"[[1]]"),
    *(
        b"{a: {b: c}}",
        b"${seed}",
        b"${run}",
        b"${model}",
        b"${oc.env:HOME}",
        b"${",
        b"}",
        b"${a.b}",
    ),
    *(b"!!python/name:os.system", b"!x", b"&a", b"*a", b"&a [*a]", b"<<: *a", b"- a", b"? a", b"|"),
    *(b">", b"'", b'"', b'"\\uD800"', b'"\\UFFFFFFFF"', b"%YAML 9", b"---", b"...", b"\t", b"\x00"),
    *(
        b"\xff",
        b"\xc3\xa9",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"@",
        b"`",
        b"#",
        b": ",
        b"???",
        b"\\",
    ),
]
TOKENS = sorted(set(TINY.replace(b":", b" : ").replace(b",", b" , ").split()))
PLACES = st.integers(0, len(TINY))


@st.composite
def damage(draw: st.DrawFn) -> bytes:
    """A copy of the tiny recipe with one to four things done to its bytes, lines or words."""
    text = TINY
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "insert", "swap", "line", "value", "token"]))
        at, to = sorted((draw(PLACES), draw(PLACES)))
        nasty = draw(st.sampled_from(NASTY) | st.binary(max_size=4))
        lines = text.split(b"\n")
        row = at % len(lines)
        match kind:
            case "cut":
                text = text[:at] + text[min(to, at + 40) :]
            case "insert":
                text = text[:at] + nasty + text[at:]
            case "swap":
                text = text[:at] + nasty + text[at + max(len(nasty), 1) :]
            case "line":
                lines[row], lines[to % len(lines)] = lines[to % len(lines)], lines[row]
                text = b"\n".join(lines[: draw(st.integers(1, len(lines)))])
            case "value":
                key, colon, _ = lines[row].partition(b": ")
                lines[row] = key + colon + nasty
                text = b"\n".join(lines)
            case "token":
                old, new = draw(st.sampled_from(TOKENS)), draw(st.sampled_from(TOKENS))
                text = text.replace(old, draw(st.sampled_from([new, nasty])), 1)
    return text


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


def outcome(file: Path, overrides: list[str]) -> str:
    """Load, and check that what is said can be shown and what is loaded can be frozen."""
    try:
        got = recipe.load(file, overrides)
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.isprintable()
            assert line.startswith((f"{file}:", "command line: "))
        return "refused"
    assert list(got.problems()) == []
    recipe.freeze(got, file.with_name("frozen.yaml"))
    assert recipe.load(file.with_name("frozen.yaml")) == recipe.absolute(got)
    return "loaded"


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=damage())
def test_a_damaged_recipe_loads_or_is_refused_with_a_message(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    event(outcome(file, []))


KEYS = st.sampled_from(["seed", "run", "model", "model.n_heads", "data.streams", "x.y", "a[0]", ""])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, st.sampled_from(NASTY) | st.binary(max_size=6)), max_size=4))
def test_any_override_loads_or_is_refused_with_a_message(
    file: Path, pairs: list[tuple[str, bytes]]
) -> None:
    file.write_bytes(TINY)
    # As the operating system hands over arguments that are not UTF-8.
    overrides = [f"{key}={value.decode(errors='surrogateescape')}" for key, value in pairs]
    event(outcome(file, overrides))
