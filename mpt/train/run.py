"""One rank's run, from a frozen recipe to the last checkpoint: build, restore, loop."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

import torch

from mpt import recipe
from mpt.checkpoint.load import restore
from mpt.checkpoint.save import Origin, Saver
from mpt.data.dataset import open_dataset
from mpt.data.loader import Loader, eval_batches
from mpt.display import Display
from mpt.dist import Ranks
from mpt.evaluate import bits_per_byte, evaluate
from mpt.launch.attempt import this_attempt
from mpt.launch.pulse import Pulse
from mpt.log import Journal
from mpt.objective import next_token_nats
from mpt.optim import training_tensors
from mpt.peak import peak_flops
from mpt.recipe import Recipe
from mpt.recipe.budget import flops_per_token
from mpt.rundir import CHECKPOINTS, versions
from mpt.state import RunState
from mpt.train.build import DTYPES, build, choose_microbatch_size, choose_precision
from mpt.train.loop import Evaluate, Services, loop
from mpt.train.stop import StopSignal
from mpt.train.watch import Watch


def train(
    cfg: Recipe, run_dir: Path, ranks: Ranks, terminal: TextIO, stop: StopSignal, pulse: Pulse
) -> int | None:
    """Run the loop from wherever the newest checkpoint says; the same call starts and resumes.

    Returns:
        The signal that stopped the run early, with its state saved, or None if it is done.

    Raises:
        MptError: what a restart would not mend.
    """
    journal = Journal(run_dir)
    microbatch_size = choose_microbatch_size(cfg, ranks)
    model, optimizer = build(cfg, ranks)
    tensors = training_tensors(model, optimizer)
    with ExitStack() as services:
        display = services.enter_context(_display(cfg, ranks, terminal))
        state = _restore(cfg, run_dir, ranks, tensors, journal, display, terminal)
        watch = _watch(cfg, state, ranks, journal, display)
        loader = services.enter_context(
            Loader(
                cfg.data,
                cfg.model,
                seed=cfg.seed,
                global_batch_size=cfg.train.global_batch_size,
                microbatch_size=microbatch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                device=ranks.device,
            )
        )
        saver = Saver(
            run_dir / CHECKPOINTS,
            tensors,
            Origin(cfg.model, recipe.recipe_hash(cfg), Path(cfg.tokenizer.path), versions()),
            ranks,
            keep=cfg.checkpoint.keep,
            report=watch.report_save,
        )
        services.callback(saver.wait)
        evaluation = _evaluation(cfg, ranks, model, microbatch_size)
        state, stopped_by = loop(
            cfg,
            state,
            model,
            optimizer,
            Services(loader, saver, watch, evaluation, stop, pulse),
            ranks,
        )
        saver.close()
    if ranks.is_first and stopped_by is not None:
        journal.event("stopped", attempt=this_attempt(), signal=stopped_by, step=state.step)
    elif ranks.is_first:
        journal.event("finished", attempt=this_attempt(), step=cfg.train.steps)
    return stopped_by


def _display(cfg: Recipe, ranks: Ranks, terminal: TextIO) -> Display:
    stream = terminal if ranks.is_first else sys.stderr  # the latter is the rank's own log
    return Display(stream, cfg.train.steps, cfg.train.log_every_steps)


def _restore(
    cfg: Recipe,
    run_dir: Path,
    ranks: Ranks,
    tensors: dict[str, torch.Tensor],
    journal: Journal,
    display: Display,
    terminal: TextIO,
) -> RunState:
    def reject(directory: Path, problems: list[str]) -> None:
        for problem in problems:  # the rank that found it says it: the others do not know
            journal.event("checkpoint_rejected", path=str(directory), why=problem)
            with suppress(OSError):
                print(f"{directory.name} is damaged: {problem}.", file=terminal)
        if ranks.is_first:
            display.note(f"{directory.name} is set aside; falling back to the one before.", "red")

    state = restore(run_dir / CHECKPOINTS, tensors, cfg.model, ranks, reject=reject)
    if state is None:
        return RunState()
    if ranks.is_first:
        journal.event("resumed", attempt=this_attempt(), step=state.step, samples=state.samples)
        display.note(f"resumed from the checkpoint of step {state.step:,}")
    return state


def _watch(cfg: Recipe, state: RunState, ranks: Ranks, journal: Journal, display: Display) -> Watch:
    dtype = DTYPES[choose_precision(cfg.train.precision, ranks.device)]
    peak = peak_flops(ranks.device, dtype)
    return Watch(
        journal,
        display,
        first=ranks.is_first,
        tokens_per_step=cfg.train.global_batch_size * cfg.model.max_seq_len,
        flops_per_token=flops_per_token(cfg.model),
        peak_flops=None if peak is None else peak * ranks.world_size,
        steps=cfg.train.steps,
        checkpoint=state.step or None,
    )


def _evaluation(
    cfg: Recipe, ranks: Ranks, model: torch.nn.Module, microbatch_size: int
) -> Evaluate | None:
    """Return the function that evaluates, or None where no data is held out."""
    if cfg.data.eval is None:
        return None
    path = Path(cfg.data.eval.path)
    tokens_per_byte = open_dataset(path).tokens_per_byte

    def run() -> tuple[float, float | None]:
        batches = eval_batches(
            path,
            cfg.model,
            microbatch_size=microbatch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            samples=cfg.eval.samples,
            device=ranks.device,
        )
        loss = evaluate(model, batches, next_token_nats, ranks.device)
        return loss, None if tokens_per_byte is None else bits_per_byte(loss, tokens_per_byte)

    return run
