"""Time to quality: what it takes to come to a held-out bits-per-byte, ours against the Trainer.

    taskset -c 0 python -m tests.bench.quality --final        (under twenty minutes of one core)
    taskset -c 0 python -m tests.bench.quality --grid         (the Trainer's rate and batch; an hour)
    taskset -c 0 python -m tests.bench.quality --ablation     (what each switch brings; an hour)

Both train the same shape from scratch on the same samples, each as its own command from a shell:
`mpt train` with a recipe, and transformers' Trainer. Neither evaluates while it trains: weights that
they leave behind are evaluated afterwards, all by one function, on text that neither has seen. The
quality to come to is what the Trainer ends with, at the best rate and batch that `--grid` found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

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
from mpt.recipe.recipe import Recipe
from mpt.recipe.size import kinds, qkv_widths
from mpt.state import IGNORE
from tests.bench import quality_report

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "recipes" / "tiny.yaml"
TOKENS = 2_867_200
"""That the Trainer trains on: 700 steps of 16 samples of 256, nine tenths of an epoch."""
THREADS = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "TOKENIZERS_PARALLELISM": "false",
}

BATCH, BEST_RATE, USUAL_RATE = 8, 2e-3, 6e-4
"""Of the Trainer: its default batch; the best rate of `--grid`; llm-foundry's, for MPT-125M."""
PLAIN: dict[str, Any] = {
    "train.global_batch_size": 8,
    "optimizer.name": "adamw",
    "optimizer.lr": 2e-3,
    "schedule": {"name": "cosine", "warmup_steps": 20, "final": 0.1},
    "train.seq_warmup": None,
}
"""Our own, with nothing of what is new."""
SWITCHES: dict[str, dict[str, Any]] = {
    "Muon": {"optimizer.name": "muon", "optimizer.lr": 8e-3},
    "sequence-length warm-up": {"train.seq_warmup": {"start": 64, "steps": 100}},
    "warm-up, stable, decay": {
        "schedule": {"name": "wsd", "warmup_steps": 20, "final": 0.0, "decay_steps": 150}
    },
}
FULL = PLAIN | {key: value for change in SWITCHES.values() for key, value in change.items()}
STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training took, and what it came to."""

    name: str
    steps: int
    tokens: int
    flops: float
    """6 N + 12 L d S a token, and Muon's products."""
    wall_s: float
    """From the command to its end, start-up included."""
    cpu_s: float
    """Of all its processes."""
    bits_per_byte: float
    curve: list[tuple[float, float]]
    """(seconds of wall clock, bits per byte) on the way; writing weights is left out."""


class Lab:
    """A directory with the data, and the trainings in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._data = {
            "tokenizer.path": f"{root}/data/tokenizer.model",
            "data.streams.stdlib.path": f"{root}/data/train",
            "data.eval.path": f"{root}/data/eval",
            "prepare.eval_fraction": 0.05,
        }
        _call([*_MPT, "data", "prepare", TINY, *_overrides(self._data)])

    def recipe(self, changes: Mapping[str, Any]) -> Recipe:
        return recipe.load(TINY, _overrides(self._data | dict(changes)))

    def ours(self, name: str, changes: Mapping[str, Any], steps: int, seed: int = 17) -> Run:
        """Train by `mpt train`."""
        every = max(1, steps // 8)
        settings = dict(changes) | {
            "train.steps": steps,
            "seed": seed,
            "eval.every_steps": 10**9,
            "eval.samples": 1,  # the recipe's own evaluation, after the last step
            "checkpoint.every_steps": every,
            "checkpoint.keep": 100,
            "launch.nproc": 1,
        }
        cfg = self.recipe(settings)
        run_dir = self.root / "ours" / f"{name}-{steps}-{seed}".replace(" ", "_")
        overrides = _overrides(self._data | settings)
        took = None
        if not (run_dir / "took.json").exists():
            took = _call([*_MPT, "train", TINY, *overrides, "--run-dir", run_dir])
            (run_dir / "took.json").write_text(json.dumps(took))
        began, wall_s, cpu_s = json.loads((run_dir / "took.json").read_text())
        at = _seconds_at(run_dir / "metrics.jsonl", began)
        curve = [
            (at[step_of(directory)], self._evaluate(cfg, _saved(directory)))
            for directory in reversed(committed(run_dir / "checkpoints"))
        ]
        tokens = steps * cfg.train.global_batch_size * cfg.model.max_seq_len
        flops = total_flops(cfg) + steps * _muon_flops(cfg)
        return Run(
            name=name,
            steps=steps,
            tokens=tokens,
            flops=flops,
            wall_s=wall_s,
            cpu_s=cpu_s,
            bits_per_byte=curve[-1][1],
            curve=curve,
        )

    def trainer(self, rate: float, batch: int, tokens: int = TOKENS, seed: int = 17) -> Run:
        """Train by transformers' Trainer."""
        cfg = self.recipe({})
        model = cfg.model
        steps = tokens // (batch * model.max_seq_len)
        out = self.root / "trainer" / f"{rate:g}-{batch}-{seed}"
        settings = {
            "out": str(out),
            "train": self._data["data.streams.stdlib.path"],
            "steps": steps,
            "every": max(1, steps // 8),
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
        if not (out / "took.json").exists():
            took = _call(
                [sys.executable, "-m", "tests.bench.quality_trainer", json.dumps(settings)]
            )
            (out / "took.json").write_text(json.dumps(took))
        _, wall_s, cpu_s = json.loads((out / "took.json").read_text())
        marks = json.loads((out / "marks.json").read_text())
        curve = [
            (
                mark["wall_s"],
                self._evaluate(cfg, load_file(out / f"step-{mark['step']:06d}.safetensors")),
            )
            for mark in marks
        ]
        n_tokens = steps * batch * model.max_seq_len
        return Run(
            name=f"Trainer, rate {rate:g}, batch {batch}",
            steps=steps,
            tokens=n_tokens,
            flops=n_tokens * flops_per_token(model),
            wall_s=wall_s,
            cpu_s=cpu_s,
            bits_per_byte=curve[-1][1],
            curve=curve,
        )

    def _evaluate(self, cfg: Recipe, weights: Mapping[str, torch.Tensor]) -> float:
        """Return the bits per byte of weights on what is held out; in bf16, as trained."""
        model = MPT(cfg.model, "blocks").eval()
        model.load_state_dict(dict(weights))
        model.bfloat16()
        dataset = open_dataset(self._data["data.eval.path"], Cache())  # type: ignore[arg-type]
        assert dataset.tokens_per_byte is not None
        nats, n = 0.0, 0
        with torch.no_grad():
            for batch in eval_batches(
                dataset,
                cfg.model,
                samples=None,
                microbatch_size=16,
                rank=0,
                world_size=1,
                device=torch.device("cpu"),
            ):
                nats += float(next_token_loss(model, batch).nats)
                n += int((batch.targets != IGNORE).sum())
        return bits_per_byte(nats / n, dataset.tokens_per_byte)


_MPT = [sys.executable, "-m", "mpt.cli.main"]


def _call(command: list[Any]) -> tuple[float, float, float]:
    """Run a command; return when it began, its seconds, and those of CPU of all its processes."""
    print("+", *command, file=sys.stderr, flush=True)
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        list(map(str, command)),
        check=True,
        env=os.environ | THREADS,
        cwd=HERE.parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall_s, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return began, wall_s, cpu_s


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _seconds_at(metrics: Path, began: float) -> dict[int, float]:
    """Return the seconds from the command to the end of each step."""
    from datetime import datetime

    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return {
        line["step"]: datetime.fromisoformat(line["time"]).timestamp() - began
        for line in lines
        if "loss" in line
    }


def _saved(directory: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(directory)
    return {name: weights.read(name) for name in weights.shapes}


def _muon_flops(cfg: Recipe) -> float:
    """Return the FLOPs of Newton-Schulz in a step: three products, five times, of each matrix."""
    if cfg.optimizer.name != "muon":
        return 0.0
    model = cfg.model
    total = 0.0
    for layer, n in kinds(model).items():
        shapes = [(rows, model.d_model) for rows in qkv_widths(model, layer)]
        shapes += [(model.d_model, model.q_width), (model.ffn_width, model.d_model)] * 1
        shapes.append((model.d_model, model.ffn_width))
        for shape in shapes:
            small, large = sorted(shape)
            total += n * 5 * (4 * small**2 * large + 2 * small**3)
    return total


def measured(root: Path, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run what is asked for, and put it into `found`."""
    lab = Lab(root)
    if arguments.grid:
        points = [(rate, 16) for rate in (USUAL_RATE, 1e-3, 2e-3, 4e-3)] + [
            (rate, 8) for rate in (1e-3, 2e-3, 4e-3)
        ]
        found["grid"] = [asdict(lab.trainer(rate, batch)) for rate, batch in points]
    if arguments.ablation:
        ways = {"plain": PLAIN, "all": FULL}
        ways |= {f"plain + {name}": PLAIN | change for name, change in SWITCHES.items()}
        for name, change in SWITCHES.items():
            ways[f"all - {name}"] = FULL | {key: PLAIN[key] for key in change}
        found["ablation"] = [
            asdict(lab.ours(name, changes, steps))
            for name, changes in ways.items()
            for steps in (STEPS, 2 * STEPS)
        ]
    if arguments.final:
        found["final"] = [
            {
                "ours": asdict(lab.ours("ours", FULL, STEPS, seed)),
                "trainer": asdict(lab.trainer(BEST_RATE, BATCH, seed=seed)),
            }
            for seed in range(17, 17 + arguments.repeats)
        ]
    found["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": THREADS["OMP_NUM_THREADS"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for what in ("--grid", "--ablation", "--final"):
        parser.add_argument(what, action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="of --final, each with a seed")
    parser.add_argument("--root", type=Path, default=Path("build/quality"), help="of data and runs")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="quality.json, .md and .png go there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(int(THREADS["OMP_NUM_THREADS"]))
    path = arguments.out / "quality.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    measured(arguments.root.absolute(), arguments, found)
    path.write_text(json.dumps(found, indent=1) + "\n")
    quality_report.write(found, arguments.out)


if __name__ == "__main__":
    main()
