"""The architecture: imports point down, floor 0 never sees torch, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = [
    {"errors", "storage", "recipe", "rundir"},
    {
        "state",
        "dist",
        "tokenizer",
        "tokenizer_json",
        "sentencepiece_file",
        "log",
        "display",
        "peak",
        "launch",
        "ledger",
        "lineage",
    },
    {"model", "data", "optim", "schedule", "checkpoint", "health"},
    {"objective", "generate", "evaluate", "hf"},
    {"train", "status", "chaos", "bench"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NO_TORCH = FLOORS[0] | {"cli"}
BAD_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
MAX_LINES, MAX_FUNCTION_LINES = 300, 60
LONGER = {Path("mpt/model/network.py"): 450}

FILES = sorted(
    path.relative_to(ROOT) for folder in ("mpt", "cli") for path in (ROOT / folder).rglob("*.py")
)


def room_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return parts[0] if parts[0] == "cli" else parts[1]


def imports(path: Path, *, at_top_only: bool) -> Iterator[str]:
    """Yield the modules a file imports; those for type checkers alone do not count."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if at_top_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down_and_siblings_keep_apart(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for module in imports(path, at_top_only=False):
        parts = module.split(".")
        if parts[0] != "mpt" or len(parts) < 2 or parts[1] not in FLOOR_OF or parts[1] == room:
            continue
        below, mine = FLOOR_OF[parts[1]], FLOOR_OF[room]
        assert below <= mine, f"{path} (floor {mine}) imports {module} (floor {below})"
        if mine == 2:
            assert below < mine, f"{path} imports its sibling {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_room_has_a_floor_and_a_name_that_says_something(path: Path) -> None:
    assert room_of(path) in FLOOR_OF or path.name == "__init__.py"
    assert not {part.lower() for part in path.with_suffix("").parts} & BAD_NAMES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_small_and_say_what_they_are(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count("\n") <= LONGER.get(path, MAX_LINES)
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a file begins with what it is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in NO_TORCH], ids=str)
def test_torch_is_not_imported_where_a_laptop_only_checks_a_recipe(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path, at_top_only=True)}
    assert not found & {"torch", "transformers", "safetensors"}


def test_every_package_travels_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.parts) for path in FILES}
    assert listed == {name.replace("cli", "mpt.cli", 1) for name in there} | {"mpt.recipes"}


@pytest.mark.parametrize(
    "code",
    [
        "import mpt",
        "import mpt.cli.main",
        "import mpt.status",
        "import mpt.data.prepare",
        "import mpt.train.start",
        "import mpt.chaos.prove",
        "import mpt.bench.run",
        "from mpt.cli.main import main; import sys; sys.argv = ['mpt', '--help']; main()",
        "from mpt.cli.main import main; import sys; "
        "sys.argv = ['mpt', 'train', 'recipes/tiny.yaml', '--check']; main()",
    ],
)
def test_torch_does_not_enter_the_process(code: str) -> None:
    probe = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stderr.strip().endswith("False"), done.stderr


def test_a_worker_imports_what_it_needs_and_no_compiler() -> None:
    """A second of start-up, and more with each package that comes along unasked."""
    unasked = {"torch._dynamo", "torch._inductor", "transformers", "omegaconf", "fsspec", "gguf"}
    code = "import sys, mpt.train.run; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert "torch" in done.stdout.split(), done.stderr
    assert not unasked & set(done.stdout.split())
