"""Trainings for `quality.py`, ours and the Trainer's, each a command of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mpt import recipe
from mpt.checkpoint.layout import committed, step_of
from mpt.checkpoint.weights import open_weights
from mpt.data.dataset import open_dataset
from mpt.data.loader import eval_batches
from mpt.evaluate import bits_per_byte
from mpt.model.network import MPT
from mpt.objective import next_token_loss
from mpt.recipe.budget import flops_per_token, total_flops
from mpt.recipe.data import Cache
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.recipe.size import kinds, qkv_widths
from mpt.state import IGNORE

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny.yaml"
MPT_COMMAND = [sys.executable, "-m", "mpt.cli.main"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
POINTS = 8
"""Of the curve of a training that is run anew; of others the end alone is looked at."""
NEWTON_SCHULZ = 5
"""Steps of Muon's."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training took, and what it came to."""

    name: str
    steps: int
    tokens: int
    flops: float
    """6 N + 12 L d S a token, and Muon's own products."""
    wall_s: float
    """From the command to its end, start-up included."""
    cpu_s: float
    """Of all its processes."""
    bits_per_byte: float
    """At the end."""
    curve: list[tuple[float, float]]
    """(seconds since the command, bits per byte) on the way."""


class Lab:
    """A directory with the data, and the trainings in it; those that are there are kept."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._train, self._eval = f"{root}/data/train", f"{root}/data/eval"
        self._data: dict[str, Any] = {
            "tokenizer.path": f"{root}/data/tokenizer.model",
            "data.streams.stdlib.path": self._train,
            "data.eval.path": self._eval,
            "prepare.eval_fraction": 0.05,
        }
        _call([*MPT_COMMAND, "data", "prepare", TINY, *_overrides(self._data)])

    def ours(
        self, name: str, changes: Mapping[str, Any], steps: int, seed: int = 17, anew: bool = False
    ) -> Run:
        """Train by `mpt train`, with changes of tiny's recipe."""
        settings = {
            "train.steps": steps,
            "seed": seed,
            "eval.every_steps": steps,
            "eval.samples": 1,  # the run's own, which none is: ours come after it
            "checkpoint.every_steps": steps // POINTS,
            "checkpoint.keep": POINTS + 1,
            "launch.nproc": 1,
        }
        overrides = _overrides(self._data | dict(changes) | settings)
        out = self._root / "ours" / f"{name}-{steps}-{seed}".replace(" ", "_")
        took = _run(out, [*MPT_COMMAND, "train", TINY, *overrides, "--run-dir", out], anew)
        at = _seconds_at(out / "metrics.jsonl", took["began"])
        curve = []
        for directory in reversed(committed(out / "checkpoints")[: POINTS if anew else 1]):
            weights = open_weights(directory)
            read = {key: weights.read(key) for key in weights.shapes}
            curve.append((at[step_of(directory)], self._bits_per_byte(read)))
        cfg = recipe.load(TINY, overrides)
        return Run(
            name=name,
            steps=steps,
            tokens=steps * cfg.train.global_batch_size * cfg.model.max_seq_len,
            flops=total_flops(cfg) + steps * muon_flops(cfg),
            wall_s=took["wall_s"],
            cpu_s=took["cpu_s"],
            bits_per_byte=curve[-1][1],
            curve=curve,
        )

    def trainer(
        self, rate: float, batch: int, tokens: int, seed: int = 17, anew: bool = False
    ) -> Run:
        """Train by transformers' Trainer."""
        model = self._model()
        steps = tokens // (batch * model.max_seq_len)
        out = self._root / "trainer" / f"{rate:g}-{batch}-{seed}"
        settings = {
            "out": str(out),
            "train": self._train,
            "steps": steps,
            "every": steps // POINTS,
            "batch": batch,
            "lr": rate,
            "warmup": steps // 20,
            "seed": seed,
            "model": {
                "d_model": model.d_model,
                "n_heads": model.n_heads,
                "n_layers": model.n_layers,
                "expansion_ratio": 4,
                "max_seq_len": model.max_seq_len,
                "vocab_size": model.vocab_size,
                "no_bias": True,
            },
        }
        module = [sys.executable, "-m", "tests.bench.quality_trainer"]
        took = _run(out, [*module, json.dumps(settings)], anew)
        marks = json.loads((out / "marks.json").read_text())
        files = {mark["step"]: out / f"step-{mark['step']:06d}.safetensors" for mark in marks}
        wanted = marks if anew else marks[-1:]
        curve = [(m["wall_s"], self._bits_per_byte(load_file(files[m["step"]]))) for m in wanted]
        return Run(
            name=f"rate {rate:g}, batch {batch}",
            steps=steps,
            tokens=steps * batch * model.max_seq_len,
            flops=steps * batch * model.max_seq_len * flops_per_token(model),
            wall_s=took["wall_s"],
            cpu_s=took["cpu_s"],
            bits_per_byte=curve[-1][1],
            curve=curve,
        )

    def _model(self) -> Model:
        return recipe.load(TINY, _overrides(self._data)).model

    def _bits_per_byte(self, weights: Mapping[str, Tensor]) -> float:
        """Return the bits per byte of what is held out; in bf16, as trained."""
        model = self._model()
        network = MPT(model, "blocks").eval()
        network.load_state_dict(dict(weights))
        network.bfloat16()
        dataset = open_dataset(self._eval, Cache())
        assert dataset.tokens_per_byte is not None
        batches = eval_batches(
            dataset,
            model,
            samples=None,
            microbatch_size=16,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        )
        nats, n = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                nats += float(next_token_loss(network, batch).nats)
                n += int((batch.targets != IGNORE).sum())
        return bits_per_byte(nats / n, dataset.tokens_per_byte)


def muon_flops(cfg: Recipe) -> float:
    """Return the FLOPs of Newton-Schulz in a step.

    X X^T, its square, and their product with X, for each matrix of n rows and m >= n columns:
    2 n^2 m + 2 n^3 + 2 n^2 m, five times.
    """
    if cfg.optimizer.name != "muon":
        return 0.0
    model, total = cfg.model, 0
    for layer, n_blocks in kinds(model).items():
        shapes = [(rows, model.d_model) for rows in qkv_widths(model, layer)]
        shapes += [(model.d_model, model.q_width)] + [(model.d_model, model.ffn_width)] * 2
        for n, m in map(sorted, shapes):
            total += n_blocks * NEWTON_SCHULZ * (4 * n * n * m + 2 * n**3)
    return float(total)


def _run(out: Path, command: list[Any], anew: bool) -> dict[str, float]:
    """Return when a training began and what it took; it is run if it never was to its end."""
    path = out / "took.json"
    if anew or not path.exists():
        shutil.rmtree(out, ignore_errors=True)
        took = _call(command)
        path.write_text(json.dumps(took))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def _call(command: list[Any]) -> dict[str, float]:
    print("+", *command, file=sys.stderr, flush=True)
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"began": began, "wall_s": wall_s, "cpu_s": cpu_s}


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _seconds_at(metrics: Path, began: float) -> dict[int, float]:
    """Return the seconds from the command to the end of each step."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return {
        line["step"]: datetime.fromisoformat(line["time"]).timestamp() - began
        for line in lines
        if "loss" in line
    }
