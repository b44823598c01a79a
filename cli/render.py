"""What results look like: tables on stdout, remarks on stderr. No logic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mpt.log import say

if TYPE_CHECKING:
    from mpt.data.streams import Part
    from mpt.hf.export import Exported
    from mpt.hf.importing import Imported
    from mpt.lineage import Account
    from mpt.recipe import Recipe
    from mpt.status import Status

    from .prospect import Prospect

GIB = 1 << 30


def tell(text: str) -> None:
    """Say a sentence on stderr."""
    say(f"mpt: {text}\n")


def plan(
    cfg: Recipe,
    prospects: list[Prospect],
    streams: list[Part] | None,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Show what a recipe would do, first of all on this machine."""
    found = prospects[0].plans[0]
    if as_json:
        parts = None if streams is None else [dataclasses.asdict(part) for part in streams]
        about = {
            "run_dir": str(run_dir),
            **dataclasses.asdict(found),
            "streams": parts,
            "chosen": [each.to_json() for each in prospects],
        }
        typer.echo(json.dumps(about))
        return
    model = cfg.model
    workers = f"{found.world_size}"
    if cfg.launch.nproc == "auto":
        workers += " (auto: one per GPU, or one; the plan is for one)"
    _rows(
        {
            "run": f"{cfg.run} in {run_dir}",
            "model": f"{found.n_parameters:,} parameters: {model.n_layers} blocks, "
            f"d_model {model.d_model}, {model.n_heads} heads, vocabulary {model.vocab_size:,}",
            "step": f"{found.samples_per_step:,} samples of {model.max_seq_len:,} tokens "
            f"= {found.tokens_per_step:,} tokens",
            "run length": f"{found.steps:,} steps = {found.total_tokens:,} tokens, "
            f"{found.total_flops:.3g} FLOPs",
            "streams": "shares hang on sizes that are known when the run starts"
            if streams is None
            else "; ".join(map(str, streams)),
            "learning rate": f"{cfg.optimizer.lr:g}, {cfg.schedule.name}, "
            f"{cfg.schedule.warmup_steps:,} warm-up steps",
            "workers": workers,
            "options": ", ".join(found.unusual) or "as MPT was released",
            **{row: _by_device(prospects, row) for row in prospects[0].choices},
            "state": f"{found.state_bytes_per_rank / GIB:.2f} GiB a worker",
            "activations": f"about, for a microbatch of {found.microbatch_size}: "
            + "; ".join(each.activations for each in prospects),
            "checkpoints": f"every {cfg.checkpoint.every_steps:,} steps, "
            f"{found.n_checkpoints_kept} kept, {found.bytes_per_checkpoint / GIB:.2f} GiB each",
        }
    )


def _by_device(prospects: list[Prospect], row: str) -> str:
    """Say what comes of a choice: once, if it is the same on all devices."""
    said = [each.choices[row] for each in prospects]
    if len(set(said)) == 1:
        return said[0]
    return "; ".join(f"{each.where} {what}" for each, what in zip(prospects, said, strict=True))


def status(found: Status) -> None:
    """Show how a run is doing."""
    state = found.state + (f" by {found.held_by}" if found.held_by else "")
    rows = {
        "run": found.run,
        "state": state,
        "step": f"{found.step:,} of {found.steps:,} ({found.tokens:,} tokens)",
        "loss": _number(found.loss, "{:.4f} nats/token"),
        "held-out": _number(found.eval_loss, "{:.4f} nats/token")
        + _number(found.eval_bits_per_byte, ", {:.4f} bits/byte", missing=""),
        "speed": _number(found.tokens_per_second, "{:,.0f} tokens/s")
        + _number(found.mfu, ", MFU {:.1%}", missing=""),
        "checkpoints": ", ".join(f"{step:,}" for step in found.checkpoints) or "none yet",
        "faults": _faults(found.account),
        "goodput": _goodput(found.account),
    }
    if found.chosen:
        rows["chosen"] = _inline(found.chosen)
    if found.nodes:
        rows["nodes"] = ", ".join(found.nodes)
    if found.breaches:
        rows["samples"] = "not one pass over the data: " + "; ".join(found.breaches)
    _rows(rows)
    for event in found.last_events:
        about = {k: v for k, v in event.items() if k not in ("event", "time")}
        typer.echo(f"  {event.get('time', '')}  {event.get('event', '')}  {_inline(about)}")


def _faults(costs: Account) -> str:
    if not costs.faults:
        return "none"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in costs.faults.items())
    return (
        kinds
        + _number(costs.detected_s_max, "; found within {:.1f} s", missing="")
        + _number(costs.restart_s_max, "; training again within {:.1f} s", missing="")
        + f"; {counted(costs.lost_steps, 'step')} taken again"
    )


def _goodput(costs: Account) -> str:
    if costs.goodput is None:
        return "-"
    return (
        f"{costs.goodput:.1%} of {timedelta(seconds=round(costs.wall_s))}, "
        f"{counted(costs.n_attempts, 'attempt')} in {counted(costs.n_launches, 'start')}"
    )


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def verified(found: dict[Path, list[str]]) -> None:
    """Show which checkpoints are sound."""
    for directory, problems in found.items():
        typer.echo(f"{directory}: {'damaged' if problems else 'sound'}")
        for problem in problems:
            typer.echo(f"  {problem}")


def passed_over(found: Mapping[Path, list[str]]) -> None:
    """Warn of checkpoints that were newer, but damaged."""
    for directory, problems in found.items():
        tell(f"{directory} is damaged and was passed over: {problems[0]}")


def exported(done: Exported, as_json: bool) -> None:
    """Show what an export wrote, and what was proved of it."""
    if as_json:
        result = {"directory": str(done.directory), "files": done.files, "dtype": done.dtype}
        proof = None if done.proof is None else dataclasses.asdict(done.proof)
        typer.echo(json.dumps({**result, "proof": proof}))
    else:
        _rows(
            {
                "exported": f"{done.directory} ({done.bytes / 1e6:,.1f} MB, {done.dtype})",
                "files": ", ".join(done.files),
                "proved": "no" if done.proof is None else str(done.proof),
            }
        )
    for note in done.notes:
        tell(note)
    if not done.proved:
        tell(
            "transformers is not installed, so nobody has checked that it computes the same: "
            "pip install 'mpt-train[hf]' and export again."
        )


def imported(done: Imported, as_json: bool) -> None:
    """Show what an import brought in."""
    if as_json:
        result = dataclasses.asdict(done) | {"directory": str(done.directory)}
        typer.echo(json.dumps(result))
    else:
        _rows(
            {
                "imported": f"{done.directory} ({done.bytes / 1e6:,.1f} MB, "
                f"{', '.join(done.dtypes)})",
                "model": f"{done.n_parameters:,} parameters, {done.architecture} in transformers",
                "files": ", ".join(done.files),
            }
        )
    for note in done.notes:
        tell(note)


def measured(found: dict[str, Any]) -> None:
    """Show what a step costs."""
    step, parts, chosen = found["step_s"], found["parts_s"], found["chosen"]
    hardware, world_size = found["hardware"], found["world_size"]
    _rows(
        {
            "speed": f"{found['tokens_per_second']:,.0f} tokens/s"
            + ("" if world_size == 1 else f", {found['tokens_per_second_per_rank']:,.0f} a worker")
            + _number(found["mfu"], ", MFU {:.1%}", missing="")
            + _number(found["causal_mfu"], " (attention halved: {:.1%})", missing=""),
            "step": f"{step['median']:.4f} s (median of {found['steps']}), "
            f"{step['p95']:.4f} s (95th percentile), {found['tokens_per_step']:,} tokens",
            "parts": ", ".join(f"{part} {seconds:.4f} s" for part, seconds in parts.items()),
            "first step": f"{found['first_step_s']:.1f} s, compiling included"
            if chosen["compile"]
            else f"{found['first_step_s']:.1f} s",
            "peak memory": f"{found['peak_memory_bytes'] / GIB:.2f} GiB a worker",
            "chosen": ", ".join(f"{key} {value}" for key, value in chosen.items()),
            "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()),
            "data": found["data"],
            "versions": ", ".join(f"{key} {value}" for key, value in found["versions"].items()),
        }
    )


def recipes(found: dict[str, str]) -> None:
    """List recipes by name, with the first line of each."""
    for name, text in found.items():
        typer.echo(f"{name:20} {text.splitlines()[0].removeprefix('# ')}")


def _rows(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        typer.echo(f"{name:14} {value}")


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


def _inline(fields: dict[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in fields.items())
