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


def tokens_to(runs: Sequence[Measured], target: float) -> float:
    """Return the tokens with which a way of training ends at the target, from whole runs of it.

    Between two lengths, and a little beyond, bits per byte fall evenly with the logarithm.
    """
    (a, b) = sorted(runs, key=lambda run: float(run["tokens"]))
    slope = (b["bits_per_byte"] - a["bits_per_byte"]) / math.log(b["tokens"] / a["tokens"])
    return float(a["tokens"]) * math.exp((target - a["bits_per_byte"]) / slope)


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
    if "ablation" in found and "final" in found:
        target = statistics.fmean(p["trainer"]["bits_per_byte"] for p in found["final"])
        lines += _ablation(found["ablation"], target)
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
            cells += [f"{run['bits_per_byte']:.4f}", f"{run['wall_s']:.0f}", f"{run['cpu_s']:.0f}"]
            cells.append(f"{run['flops']:.2e}")
            ratios = [pair["trainer"][key] / run[key] for key in keys]
            cells += [f"**{r:.2f}**" for r in ratios] if name == "ours" else [""] * 3
            lines.append("| " + " | ".join(cells) + " |")
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


def _ablation(runs: Sequence[Measured], target: float) -> list[str]:
    ways: dict[str, list[Measured]] = {}
    for run in runs:
        ways.setdefault(run["name"], []).append(run)
    lines = [
        "",
        "## What each switch brings",
        "",
        f"Each way at two lengths. Tokens, CPU seconds and FLOPs to {target:.4f} bits per byte are "
        "read off between them, or a little beyond, on a straight line over the logarithm of "
        "tokens.",
        "",
        "| | bits/byte, short | long | tokens to it | CPU, s | FLOPs | x CPU of plain |",
        "|---" * 7 + "|",
    ]
    plain_s = 0.0
    for name, pair in ways.items():
        short, long = sorted(pair, key=lambda run: float(run["tokens"]))
        tokens = tokens_to(pair, target)
        rate = (long["cpu_s"] - short["cpu_s"]) / (long["tokens"] - short["tokens"])
        cpu_s = short["cpu_s"] + rate * (tokens - short["tokens"])
        flops = tokens * long["flops"] / long["tokens"]
        plain_s = plain_s or cpu_s
        lines.append(
            f"| {name} | {short['bits_per_byte']:.4f} | {long['bits_per_byte']:.4f} | "
            f"{tokens:,.0f} | {cpu_s:.0f} | {flops:.2e} | {plain_s / cpu_s:.2f} |"
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
    axes.set_xlabel("seconds since the command, one core")
    axes.set_ylabel("held-out bits per byte")
    axes.set_ylim(top=min(2.6, axes.get_ylim()[1]))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
