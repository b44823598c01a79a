"""One supervisor a node: it leads the run or follows the one who does, until the run is over."""

from __future__ import annotations

import sys
import time

from mpt import errors
from mpt.errors import MptError, RestartBudgetError
from mpt.launch.ending import End, stopped
from mpt.launch.fault import Fault
from mpt.launch.follow import follow
from mpt.launch.lead import WATCH_S, Leader
from mpt.launch.lease import Claim, Lease, Rival, taken
from mpt.launch.node import Node
from mpt.launch.run import Run
from mpt.launch.signals import Signals, Stopped, stop_signals
from mpt.log import say

HOLD_BACK_S = 10.0
"""A node that is not the one named by --rdzv leaves it this long to take the lead."""

SHOW_CURSOR = "\x1b[?25h"


def supervise(run: Run, node: Node) -> int:
    """Take part in a run until it is over, leading it whenever nobody else does.

    Returns:
        The exit code for `mpt`: 0 done, 75 and 130 stopped by a signal with a checkpoint.

    Raises:
        MptError: what ended the run; UsageError if it belongs to another launch.
    """
    try:
        with stop_signals() as signals:
            try:
                end = _take_part(run, node, signals)
            finally:
                node.close()
    finally:
        if sys.stderr.isatty():
            say(SHOW_CURSOR)  # a rank that was killed could not
    match end.exit_code:
        case errors.EXIT_DONE | errors.EXIT_PREEMPTED | errors.EXIT_INTERRUPTED:
            return end.exit_code
        case errors.EXIT_RESTARTS:
            raise RestartBudgetError(end.why)
    error = MptError(end.why or "terminated")
    error.exit_code = end.exit_code
    raise error


def _take_part(run: Run, node: Node, signals: Signals) -> End:
    alone = run.cfg.max_nodes == 1
    rival = Rival(run.run_dir, node.name)
    hold_back_until = time.monotonic() + (0.0 if run.place.leads_first else HOLD_BACK_S)
    lost: Fault | None = None
    prepared = False
    while True:
        if signals.latest:
            return stopped(signals.latest)
        if rival.look() and time.monotonic() >= hold_back_until:
            if (lease := rival.take()) is not None:
                ready = rival.claim is not None and rival.claim.ready
                ended = _lead(run, node, lease, lost, signals, prepared=prepared and ready)
                if ended is not None:
                    return ended
                hold_back_until = time.monotonic() + HOLD_BACK_S
                prepared, lost = True, None
        elif rival.claim is not None and (alone or _is_alone(rival.claim)):
            if rival.renewed:
                raise taken(run.run_dir, rival.claim)
        elif rival.claim is not None and rival.claim.address is not None:
            followed = follow(run, node, rival.claim, rival.claim.address, lost, signals)
            if isinstance(followed, End):
                return followed
            if followed is not None:
                prepared, lost = True, followed
        time.sleep(WATCH_S)


def _is_alone(claim: Claim) -> bool:
    """Whether a launch that is ready has no place for other nodes."""
    return claim.ready and claim.address is None


def _lead(
    run: Run,
    node: Node,
    lease: Lease,
    lost: Fault | None,
    signals: Signals,
    *,
    prepared: bool,
) -> End | None:
    """Lead from here on, until the end or until another node should.

    Args:
        lost: that of the node which led before, if this one followed it.
        prepared: this launch has made run directory and data ready already.
    """
    try:
        if not prepared:
            with signals.raised():
                run.prepare()
        if run.cfg.max_nodes > 1 and run.is_done():  # a node that is late must not wait for others
            return End(errors.EXIT_DONE)
        return Leader(run, node, lease, signals).lead(lost)
    except Stopped:
        return stopped(signals.latest)
    finally:
        node.kill()
        lease.release()
