"""Time to quality: what it takes to come to a held-out bits-per-byte, ours against the Trainer.

    taskset -c 0 python -m tests.bench.quality --final      (under twenty minutes of one core)
    taskset -c 0 python -m tests.bench.quality --grid       (the Trainer's rate and batch; an hour)
    taskset -c 0 python -m tests.bench.quality --ablation   (what each switch brings; half an hour)

Both train the same shape from scratch on the same samples, each as its own command from a shell:
`mpt train` with a recipe, and transformers' Trainer. Weights that they leave behind on the way are
evaluated afterwards, all by one function, on text that neither has seen. The quality to come to is
what the Trainer ends with, at the best rate and batch that `--grid` found.

Trainings of grid and ablation that are in `--root` already are not run again; those of `--final`
are. What is measured is kept in quality.json, from which quality.md and quality.png are made.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.bench import quality_report
from tests.bench.quality_lab import Lab

TOKENS = 2_867_200
"""That the Trainer trains on: 700 steps of 16 samples of 256, nine tenths of an epoch."""
USUAL_RATE = 6e-4
"""llm-foundry's, for the smallest of its models."""
BATCH, BEST_RATE = 8, 2e-3
"""Of `--grid`."""

HALF = "half of the steps"
PLAIN: dict[str, Any] = {
    "train.global_batch_size": 8,
    "train.seq_warmup": None,
    "model.init_config": {"name": "baseline_", "init_std": 0.02},
    "optimizer.name": "adamw",
    "optimizer.lr": 2e-3,
    "schedule": {"name": "cosine", "warmup_steps": 20, "final": 0.1},
}
"""Ours, with the Trainer's own settings: its rate, batch and spread of first weights."""
MUON = {"optimizer.name": "muon", "optimizer.lr": 8e-3}
SHORT_FIRST = {"train.seq_warmup": {"start": 32, "steps": HALF}}
STABLE_FIRST = {"schedule": {"name": "wsd", "warmup_steps": 20, "final": 0.0, "decay_steps": HALF}}
OURS = PLAIN | MUON
"""With what wins in the ablation."""
ROWS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "plain, short samples first": PLAIN | SHORT_FIRST,
    "plain, stable, then down to zero": PLAIN | STABLE_FIRST,
    "Muon": OURS,
    "Muon, short samples first": OURS | SHORT_FIRST,
    "Muon, stable, then down to zero": OURS | STABLE_FIRST,
    "Muon and both": OURS | SHORT_FIRST | STABLE_FIRST,
    "Muon, z-loss 1e-4": OURS | {"train.z_loss": 1e-4},
    "Muon, from weights of kaiming_normal_": OURS | {"model.init_config": {}},
}
LONGER = "Muon, for longer"
STEPS, SHORT = 340, 200
"""Of ours, with which it comes to where the Trainer ends; and of each row of the ablation."""


def measured(lab: Lab, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run what is asked for, and put it into `found`."""
    if arguments.grid:
        points = [(rate, 8) for rate in (USUAL_RATE, 1e-3, 2e-3)]
        points += [(rate, 16) for rate in (1e-3, 2e-3, 4e-3)]
        found["grid"] = [asdict(lab.trainer(rate, batch, TOKENS)) for rate, batch in points]
    if arguments.ablation:
        ways = [(name, of_length(way, SHORT), SHORT) for name, way in ROWS.items()]
        ways.append((LONGER, of_length(OURS, 2 * SHORT), 2 * SHORT))
        found["ablation"] = [asdict(lab.ours(*way)) for way in ways]
    if arguments.final:
        tokens, steps = TOKENS // arguments.shrink, STEPS // arguments.shrink
        found["final"] = [
            {
                "trainer": asdict(lab.trainer(BEST_RATE, BATCH, tokens, seed, anew=True)),
                "ours": asdict(lab.ours("ours", of_length(OURS, steps), steps, seed, anew=True)),
            }
            for seed in range(17, 17 + arguments.repeats)
        ]
    found["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def of_length(way: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return a way of training with its shares of the run in steps."""

    def counted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: counted(inner) for key, inner in value.items()}
        return steps // 2 if value == HALF else value

    return {key: counted(value) for key, value in way.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for what in ("--grid", "--ablation", "--final"):
        parser.add_argument(what, action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="of --final, each with a seed")
    parser.add_argument("--shrink", type=int, default=1, help="--final, to see that it works")
    parser.add_argument("--root", type=Path, default=Path("build/quality"), help="of data and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="of what is found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "quality.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if arguments.grid or arguments.ablation or arguments.final:
        measured(Lab(arguments.root.absolute()), arguments, found)
        path.write_text(json.dumps(found, indent=1) + "\n")
    quality_report.write(found, arguments.out)
    print((arguments.out / "quality.md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
