"""One rank's run, from a frozen recipe to the last checkpoint: build, restore, loop."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from mpt import recipe
from mpt.checkpoint.layout import committed, step_of
from mpt.checkpoint.memory import Memory
from mpt.checkpoint.save import Origin, Saver
from mpt.data.loader import Loader
from mpt.display import Display
from mpt.dist import Ranks, with_replicas
from mpt.launch.attempt import newer_attempt, this_attempt
from mpt.launch.pulse import Phase, Pulse
from mpt.ledger import Ledger
from mpt.log import Journal
from mpt.optim import training_tensors
from mpt.peak import peak_flops
from mpt.recipe import Recipe
from mpt.recipe.activations import Precision
from mpt.recipe.budget import flops_per_token
from mpt.recipe.fit import Fit, fit
from mpt.rundir import CHECKPOINTS, versions
from mpt.state import RunState
from mpt.tokenizer import load_tokenizer
from mpt.train.bad_samples import BadSamples
from mpt.train.begin import begin_with
from mpt.train.build import DTYPES, build, machine_of
from mpt.train.chosen import Settled, recall, settle
from mpt.train.evaluation import evaluation, evaluation_owed
from mpt.train.inject import Injector
from mpt.train.loop import Services, loop
from mpt.train.pace import Pace, time_collectives
from mpt.train.restore import restore
from mpt.train.rollback import roll_back, same_ledger, write_entry
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
    ledger = same_ledger(run_dir, ranks, cfg.train.global_batch_size)
    with ExitStack() as stack:
        display = stack.enter_context(_display(cfg, ranks, terminal))
        journal = Journal(run_dir, complain=lambda why: display.note(why, "red"))
        settled, ranks, model, optimizer = _settled(cfg, run_dir, ranks, journal, pulse)
        chosen = settled.fit
        tensors = training_tensors(model, optimizer)
        memory = _memory(cfg, tensors, ranks, journal, display)
        stack.callback(memory.wait)
        state = restore(
            run_dir,
            tensors,
            cfg.model,
            memory,
            ranks,
            begin=lambda: begin_with(cfg.train.init_from, tensors, ranks, journal, display),
            given_up=lambda state: ledger.went_back_from(state.samples),
            journal=journal,
            display=display,
            terminal=terminal,
        )
        watch = _watch(cfg, run_dir, ledger, chosen.precision, ranks, journal, display)
        eod_id = _document_end(cfg)
        loader = stack.enter_context(_loader(cfg, ledger, chosen, eod_id, ranks))
        saver = _saver(cfg, run_dir, tensors, settled, ranks, watch)
        stack.callback(saver.wait)
        _save_if_due(cfg, state, saver)
        services = Services(
            loader=loader,
            reduce_each=chosen.reduce_gradients == "each",
            ledger=ledger,
            watch=watch,
            roll_back=partial(
                roll_back, run_dir=run_dir, ledger=ledger, cfg=cfg.health, ranks=ranks
            ),
            evaluate=evaluation(cfg, ranks, model, chosen.microbatch_size, eod_id, stop, pulse),
            evaluation_owed=evaluation_owed(cfg, run_dir, state.step, ranks),
            bad_samples=BadSamples(journal, cfg.data),
            memory=memory,
            saver=saver,
            stop=stop,
            pulse=pulse,
            pace=_pace(model, ranks, journal, display),
            injector=Injector.wanted(os.environ, run_dir, ranks),
        )
        state, stopped_by = loop(cfg, state, model, optimizer, services, ranks)
        saver.close()
    _note_the_end(journal, ranks, state.step, stopped_by)
    return stopped_by


def _settled(
    cfg: Recipe, run_dir: Path, ranks: Ranks, journal: Journal, pulse: Pulse
) -> tuple[Settled, Ranks, torch.nn.Module, torch.optim.Optimizer]:
    """Return what every `auto` came to, and the ranks, the model and the optimizer built for it."""

    def complain(why: str) -> None:
        if ranks.is_first:
            journal.event("warning", attempt=this_attempt(), why=why)

    machine = machine_of(ranks)
    estimate = fit(cfg, machine, ranks.world_size)
    settled = recall(run_dir, cfg, machine, estimate, ranks)
    begins = estimate if settled is None else settled.fit
    mesh_ranks = with_replicas(ranks, begins.replicas)
    model, optimizer = build(cfg, begins, mesh_ranks)
    if settled is None:
        beat = partial(pulse.beat, Phase.START, 0)
        settled = settle(
            run_dir, cfg, machine, estimate, model, mesh_ranks, beat=beat, complain=complain
        )
    if ranks.is_first:
        about = {"by": "memory" if settled.remembered else settled.by, **settled.fit.to_json()}
        journal.event("chosen", attempt=this_attempt(), **about)
    return settled, mesh_ranks, model, optimizer


def _note_the_end(journal: Journal, ranks: Ranks, step: int, stopped_by: int | None) -> None:
    if not ranks.is_first:
        return
    if stopped_by is not None:
        journal.event("stopped", attempt=this_attempt(), signal=stopped_by, step=step)
    else:
        journal.event("finished", attempt=this_attempt(), step=step)


def _display(cfg: Recipe, ranks: Ranks, terminal: TextIO) -> Display:
    stream = terminal if ranks.is_first else sys.stderr  # the latter is the rank's own log
    return Display(stream, cfg.train.steps, cfg.train.log_every_steps)


def _pace(model: torch.nn.Module, ranks: Ranks, journal: Journal, display: Display) -> Pace:
    pace = Pace(ranks, journal, display)
    time_collectives(model, pace.waiting)
    return pace


def _memory(
    cfg: Recipe,
    tensors: dict[str, torch.Tensor],
    ranks: Ranks,
    journal: Journal,
    display: Display,
) -> Memory:
    def report(kind: str, *, why: str) -> None:
        if ranks.is_first:
            journal.event(kind, attempt=this_attempt(), why=why)
            display.note(why, "yellow")

    return Memory.inherited(
        tensors,
        ranks,
        every=cfg.checkpoint.memory_every_steps,
        origin={"recipe": recipe.recipe_hash(cfg)},
        report=report,
    )


def _loader(cfg: Recipe, ledger: Ledger, chosen: Fit, eod_id: int | None, ranks: Ranks) -> Loader:
    samples = cfg.train.global_batch_size
    return Loader(
        cfg.data,
        cfg.model,
        seed=cfg.seed,
        global_batch_size=samples,
        microbatch_size=chosen.microbatch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        node_ranks=ranks.of_node,
        device=ranks.device,
        eod_id=eod_id,
        following=lambda position: ledger.position(position + samples),
    )


def _document_end(cfg: Recipe) -> int | None:
    """Return the token that ends a document, where documents do not see each other."""
    if not cfg.model.attn_uses_sequence_id:
        return None
    return load_tokenizer(Path(cfg.tokenizer.path)).eod_id


def _saver(
    cfg: Recipe,
    run_dir: Path,
    tensors: dict[str, torch.Tensor],
    settled: Settled,
    ranks: Ranks,
    watch: Watch,
) -> Saver:
    origin = Origin(
        cfg.model,
        recipe.recipe_hash(cfg),
        Path(cfg.tokenizer.path),
        versions(),
        chosen=settled.to_json(),
    )
    return Saver(
        run_dir / CHECKPOINTS,
        tensors,
        origin,
        ranks,
        keep=cfg.checkpoint.keep,
        report=watch.report_save,
        attempt=this_attempt(),
        newer=partial(newer_attempt, run_dir),
    )


def _flops_per_token(cfg: Recipe, step: int) -> float:
    """Return those of the step that was the run's `step`-th."""
    length = cfg.train.sequence_length(step - 1, cfg.model.max_seq_len)
    return flops_per_token(replace(cfg.model, max_seq_len=length))


def _save_if_due(cfg: Recipe, state: RunState, saver: Saver) -> None:
    """Save what was restored from memory alone, if the step is one whose checkpoint shall be."""
    if state.step and (
        state.step % cfg.checkpoint.every_steps == 0 or state.step == cfg.train.steps
    ):
        saver.save(state)  # returns at once where it is committed


def _watch(
    cfg: Recipe,
    run_dir: Path,
    ledger: Ledger,
    precision: Precision,
    ranks: Ranks,
    journal: Journal,
    display: Display,
) -> Watch:
    peak = peak_flops(ranks.device, DTYPES[precision])
    return Watch(
        journal,
        display,
        first=ranks.is_first,
        ledger=ledger,
        write=partial(write_entry, run_dir),
        cfg=cfg.health,
        samples_per_step=cfg.train.global_batch_size,
        tokens_per_step=cfg.train.global_batch_size * cfg.model.max_seq_len,
        flops_per_token=partial(_flops_per_token, cfg),
        peak_flops=None if peak is None else peak * ranks.world_size,
        steps=cfg.train.steps,
        checkpoint=max(map(step_of, committed(run_dir / CHECKPOINTS)), default=None),
    )
