"""The tables and the picture of `quality.py`, from what it measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
"""A `Run`, as JSON."""


def seconds_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Return when a curve of (seconds, bits per byte) comes down to the target, between points.

    Infinite if it never does.
    """
    for (before_s, before), (after_s, after) in pairwise(curve):
        if after <= target:
            part = (before - target) / (before - after) if before > target else 0.0
            return before_s + part * (after_s - before_s)
    return math.inf


def write(found: dict[str, Any], out: Path) -> None:
    """Write quality.md, and quality.png where there is something to draw."""
    lines = ["# Time to quality", ""]
    machine = found["machine"]
    lines.append(
        f"`taskset -c 0 python -m tests.bench.quality --final`, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}, "
        f"{machine['threads']} thread. tiny's shape: d_model 192, 3 heads, 4 blocks, 256 tokens, "
        "vocabulary 4,096; modules of the standard library, 5 % of them held out."
    )
    if "final" in found:
        lines += _final(found["final"])
        draw(found["final"], out / "quality.png")
    if "grid" in found:
        lines += _grid(found["grid"])
    if "ablation" in found:
        lines += _ablation(found["ablation"])
    notes = out / "quality_notes.md"
    text = "\n".join(lines) + "\n" + (notes.read_text() if notes.exists() else "")
    (out / "quality.md").write_text(text)


def _final(pairs: Sequence[dict[str, Measured]]) -> list[str]:
    lines = [
        "",
        "## Ours against the Trainer",
        "",
        "Seconds from the command to the end, start-up included; CPU seconds of all processes. The "
        "last columns are how many times less ours takes.",
        "",
        "| seed | | steps | tokens | bits/byte | wall, s | CPU, s | FLOPs |"
        " x wall | x CPU | x FLOPs |",
        "|---" * 11 + "|",
    ]
    keys = ("wall_s", "cpu_s", "flops")
    for number, pair in enumerate(pairs):
        for name in ("trainer", "ours"):
            run = pair[name]
            cells = [f"{number + 1}", name, f"{run['steps']:,}", f"{run['tokens']:,}"]
            wall = "-" if run["wall_s"] is None else f"{run['wall_s']:.0f}"
            cells += [f"{run['bits_per_byte']:.4f}", wall, f"{run['cpu_s']:.0f}"]
            cells.append(f"{run['flops']:.2e}")
            for key in keys:
                both = run[key] is not None and name == "ours"
                cells.append(f"**{pair['trainer'][key] / run[key]:.2f}**" if both else "")
            lines.append("| " + " | ".join(cells) + " |")
    if any(run["wall_s"] is None for pair in pairs for run in pair.values()):
        lines += ["", "No wall clock: both ran beside other work, and not at the same time."]
        return lines
    lines.append("")
    for number, pair in enumerate(pairs):
        target = pair["trainer"]["bits_per_byte"]
        early = seconds_to(pair["ours"]["curve"], target)
        ratio = pair["trainer"]["wall_s"] / early
        told = f"after {early:.0f} s, {ratio:.2f} times sooner" if early < math.inf else "never"
        lines.append(f"Ours of seed {number + 1} comes to {target:.4f} {told}.")
    return lines


def _grid(runs: Sequence[Measured]) -> list[str]:
    lines = ["", "## The Trainer's rate and batch", "", "| | steps | bits/byte |", "|---|---|---|"]
    return lines + [
        f"| {run['name']} | {run['steps']:,} | {run['bits_per_byte']:.4f} |" for run in runs
    ]


def _ablation(runs: Sequence[Measured]) -> list[str]:
    """Say what each way costs for the same quality.

    Bits per byte at the end of a run fall evenly with the logarithm of its tokens: how fast, the
    same way at two lengths says.
    """
    by_name = {run["name"]: run for run in runs}
    if not {"plain", "Muon", "Muon, for longer"} <= by_name.keys():
        return []
    plain, short, long = by_name["plain"], by_name["Muon"], by_name.pop("Muon, for longer")
    slope = (long["bits_per_byte"] - short["bits_per_byte"]) / math.log(
        long["tokens"] / short["tokens"]
    )
    lines = [
        "",
        "## What each switch brings",
        "",
        f"{short['steps']} steps of {short['tokens'] // short['steps']:,} tokens each. *Worth*: "
        "how many times fewer tokens, FLOPs and CPU seconds (start-up included) it takes for the "
        "same quality than plain AdamW with a cosine; bits per byte are turned into tokens by what "
        f"twice the tokens bring Muon, {-slope * math.log(2):.3f}.",
        "",
        "| | bits/byte | FLOPs | CPU, s | worth: tokens | FLOPs | CPU |",
        "|---" * 7 + "|",
    ]
    for name, run in by_name.items():
        fewer = math.exp((run["bits_per_byte"] - plain["bits_per_byte"]) / slope)
        worth = [fewer, *(fewer * plain[key] / run[key] for key in ("flops", "cpu_s"))]
        lines.append(
            f"| {name} | {run['bits_per_byte']:.4f} | {run['flops']:.2e} | {run['cpu_s']:.0f} | "
            + " | ".join(f"{value:.2f}" for value in worth)
            + " |"
        )
    return lines


def draw(pairs: Sequence[dict[str, Measured]], path: Path) -> None:
    """Draw bits per byte over seconds of both, for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = {"trainer": "#777777", "ours": "#c0392b"}
    names = {"trainer": "transformers Trainer", "ours": "mpt train"}
    for number, pair in enumerate(pairs):
        for who, colour in colours.items():
            seconds, bits = zip(*pair[who]["curve"], strict=True)
            label = names[who] if number == 0 else None
            axes.plot(seconds, bits, "o-", color=colour, markersize=3, linewidth=1.5, label=label)
    target = statistics.fmean(pair["trainer"]["bits_per_byte"] for pair in pairs)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
    walls = all(run["wall_s"] is not None for pair in pairs for run in pair.values())
    axes.set_xlabel(f"{'' if walls else 'CPU '}seconds since the command, one core")
    axes.set_ylabel("held-out bits per byte")
    axes.set_ylim(top=min(2.6, axes.get_ylim()[1]))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
