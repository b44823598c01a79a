"""The whole recipe: every section, and the checks that need more than one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mpt.recipe.data import Data, Prepare, Tokenizer
from mpt.recipe.launch import Launch
from mpt.recipe.model import Model
from mpt.recipe.problem import Problem
from mpt.recipe.train import Checkpoint, Evaluation, Health, Optimizer, Schedule, Train

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: str
    """Name of the run; its directory is runs/<run> unless --run-dir says otherwise."""
    seed: int = 17
    """Seed of the weights, the sample order and dropout."""
    model: Model
    tokenizer: Tokenizer
    data: Data
    prepare: Prepare | None = None
    """How the data and the tokenizer are made when they are missing."""
    train: Train
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Schedule)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    health: Health = field(default_factory=Health)
    launch: Launch = field(default_factory=Launch)

    def problems(self) -> Iterator[Problem]:
        """Yield everything that is wrong once each key has its type."""
        if not RUN_NAME.fullmatch(self.run):
            yield Problem("run", f"{self.run!r} is not a name of letters, digits, '.', '_' or '-'.")
        if not 0 <= self.seed < 2**63:
            yield Problem("seed", f"{self.seed} is not in [0, 2**63).")
        yield from self.model.problems()
        yield from self.tokenizer.problems()
        yield from self.data.problems()
        if self.prepare is not None:
            yield from self.prepare.problems()
        yield from self.train.problems()
        yield from self.optimizer.problems()
        yield from self.schedule.problems(self.train.steps)
        yield from self.eval.problems()
        yield from self.checkpoint.problems()
        yield from self.health.problems()
        yield from self.launch.problems()
        yield from self._across_sections()

    def _across_sections(self) -> Iterator[Problem]:
        held_out = self.data.eval
        warmup, longest = self.train.seq_warmup, self.model.max_seq_len
        if warmup is not None and warmup.start >= 1:
            times, rest = divmod(longest, warmup.start)
            if rest or times < 2 or times & (times - 1):
                yield Problem(
                    "train.seq_warmup.start",
                    f"{warmup.start} doubled again and again does not come to "
                    f"model.max_seq_len {longest}.",
                    f"use {longest} divided by 2, 4, 8, ...",
                )
        if warmup is not None and warmup.steps > self.train.steps:
            yield Problem(
                "train.seq_warmup.steps",
                f"{warmup.steps} is more than train.steps {self.train.steps}: no sample would ever "
                "be whole.",
            )
        for name, stream in self.data.streams.items():
            if held_out is not None and held_out.path == stream.path:
                yield Problem("data.eval.path", f"is also the path of the stream {name!r}.")
        remote = any("://" in stream.path for stream in self.data.streams.values())
        if remote and not self.data.cache.deadline_s < self.launch.hang.min_s:
            yield Problem(
                "data.cache.deadline_s",
                f"{self.data.cache.deadline_s:g} is not below launch.hang.min_s "
                f"{self.launch.hang.min_s:g}: a step that waits for data would be killed as one "
                "that hangs.",
            )
        if self.prepare is not None and len(self.data.streams) != 1:
            yield Problem(
                "prepare",
                f"fills one stream, but data.streams names {len(self.data.streams)}.",
                "prepare the others with `mpt data prepare` and drop this section.",
            )
        curate = self.prepare.curate if self.prepare is not None else None
        wanted = curate.decontaminate if curate is not None else None
        if wanted is not None and wanted.eval_split and held_out is None:
            yield Problem(
                "prepare.curate.decontaminate.eval_split",
                "is true, but there is no data.eval to keep apart.",
                "name data.eval.path, or drop this.",
            )
        if self.prepare is not None and held_out is not None and self.prepare.eval_fraction == 0:
            yield Problem(
                "prepare.eval_fraction",
                "is 0, so data.eval would stay empty.",
                "use 0.01, or drop data.eval.",
            )
