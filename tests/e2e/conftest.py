"""A small corpus and recipe, prepared once, and the `mpt` command as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
    run: small
    seed: 5
    model:
      {{d_model: 32, n_heads: 4, n_layers: 2, max_seq_len: 32, vocab_size: 384, resid_pdrop: 0.1}}
    tokenizer: {{path: {root}/tokenizer.model}}
    data:
      streams:
        stdlib: {{path: {root}/train}}
      eval: {{path: {root}/eval}}
    prepare: {{source: {root}/text, eval_fraction: 0.2}}
    train: {{steps: 20, global_batch_size: 6, microbatch_size: 2, precision: fp32}}
    optimizer: {{lr: 3.0e-3}}
    schedule: {{name: cosine, warmup_steps: 4}}
    eval: {{every_steps: 10, samples: 8}}
    checkpoint: {{every_steps: 5, keep: 4}}
"""

PATIENCE_S = 120


@dataclass(frozen=True)
class Small:
    """A prepared corpus, and the recipe that trains on it."""

    root: Path
    recipe: Path

    def command(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "mpt.cli.main", *map(str, args)]

    def mpt(self, *args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `mpt`, and check its exit code and that no traceback reaches the user."""
        done = subprocess.run(
            self.command(*args), capture_output=True, text=True, timeout=PATIENCE_S, cwd=self.root
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        return done

    def start(
        self, *args: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `mpt`, with more in its environment, and return at once."""
        return subprocess.Popen(
            self.command(*args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**os.environ, **(environment or {})},
        )


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")
    (root / "text").mkdir()
    library = Path(os.__file__).parent
    for i, name in enumerate(("textwrap", "shlex", "bisect", "heapq", "keyword", "sched", "queue")):
        source = (library / f"{name}.py").read_text(encoding="utf-8")
        for j, page in enumerate(source.split("\n\n\n")):
            (root / "text" / f"{i}-{j:03}.py").write_text(page, encoding="utf-8")
    recipe = root / "small.yaml"
    recipe.write_text(textwrap.dedent(RECIPE).format(root=root), encoding="utf-8")
    found = Small(root, recipe)
    found.mpt("data", "prepare", recipe)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log so far."""
    if not path.exists():
        return []
    whole_lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def await_that(claim: Callable[[], Any], process: subprocess.Popen[str] | None) -> Any:
    """Return what the claim returns once that is truthy; a file offers nothing else to wait on.

    Args:
        process: `mpt`, if the claim can only come true while it runs.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := claim():
            return found
        if process is not None and process.poll() is not None:
            found = claim()
            assert found, f"mpt ended with {process.returncode}: {process.communicate()[1]}"
            return found
        time.sleep(0.02)
    raise AssertionError("it never came to be")


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end with the test, however it ends."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
