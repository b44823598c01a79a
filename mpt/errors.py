"""The errors a user can cause, each with the exit code that `mpt` ends with."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_RESTARTS = 5
EXIT_DIVERGED = 6
EXIT_PREEMPTED = 75
EXIT_ROLL_BACK = 76
"""Of a worker, never of `mpt`: start again from the checkpoint that the ledger names."""
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class MptError(Exception):
    """Something a user can cause and mend. The message says where, what, and what to do."""

    exit_code = EXIT_INTERNAL


class UsageError(MptError):
    """A command, a path or a run directory that cannot be used as asked."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe that cannot be trained; its message lists every problem, a line each."""


class DataError(MptError):
    """Text, a tokenizer, a shard or a dataset that is missing, corrupt or does not fit."""

    exit_code = EXIT_DATA


class BadRowError(DataError):
    """One sample that is corrupt or of another length; the others of its shard may be sound."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class CheckpointError(MptError):
    """A checkpoint that is missing, corrupt, or of another model."""

    exit_code = EXIT_CHECKPOINT


class OtherFormatError(CheckpointError):
    """A checkpoint of another version of mpt: not to be read, and not damaged."""


class RestartBudgetError(MptError):
    """Workers kept dying until the restart budget was used up."""

    exit_code = EXIT_RESTARTS


class DivergedError(MptError):
    """Loss or gradient stayed non-finite or far too high; going on would only burn time."""

    exit_code = EXIT_DIVERGED


class RollbackError(MptError):
    """Not a failure: the run is to go on from an earlier checkpoint, past the data it failed on."""

    exit_code = EXIT_ROLL_BACK


class ExportError(MptError):
    """An export whose model or tokenizer does not do in transformers what ours does."""
