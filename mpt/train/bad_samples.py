"""Samples that steps skip (data.on_bad_sample): each is written down, and too many end the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mpt.errors import DataError
from mpt.launch.attempt import this_attempt
from mpt.log import Journal, read_lines
from mpt.recipe.data import Data
from mpt.rundir import EVENTS
from mpt.state import BadSample, Microbatch, RunState

EVENT = "bad_sample"
MOST_NAMED = 20
"""In the message that ends a run; events.jsonl has them all."""


@dataclass(frozen=True)
class BadSamples:
    """This rank's record of them. How many there were in all is in the state of the run."""

    journal: Journal
    data: Data

    def report(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """Write down what a step skips on this rank; before the ranks meet in that step."""
        for microbatch in microbatches:
            for sample in microbatch.skipped:
                self.journal.event(EVENT, attempt=this_attempt(), step=step, **asdict(sample))

    def check(self, state: RunState) -> None:
        """End the run once more were skipped than it may; every rank has the same count.

        Raises:
            DataError: names them.
        """
        budget = self.data.bad_sample_budget
        if self.data.on_bad_sample == "error" or state.bad_samples <= budget:
            return
        named = _recorded(self.journal)
        more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        raise DataError(
            f"{state.bad_samples} bad samples were skipped, and data.bad_sample_budget is "
            f"{budget}. Mend the data, or allow more. All are in {EVENTS}: "
            f"{'; '.join(named[:MOST_NAMED])}{more}."
        )


def _recorded(journal: Journal) -> list[str]:
    """Return each sample that was skipped in a run once, however often the step was taken."""
    found = {}
    for event in read_lines(journal.run_dir / EVENTS):
        if event.get("event") == EVENT:
            keys = (event.get(key) for key in BadSample.__dataclass_fields__)
            sample = BadSample(*keys)  # type: ignore[arg-type]  # only to be shown
            found[str(sample)] = sample
    return list(found)
