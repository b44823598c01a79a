"""Waiting for the nodes of an attempt: for enough of them, and not for ever."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpt.launch.group import Member
from mpt.recipe.launch import Launch

LAST_CALL_S = 5.0
"""With enough nodes to start but fewer than there may be, wait this long for one more."""

GIVE_WAY_S = 8.0
"""A node that has led, and is cut off from all others for this long, lets another lead."""

DISK_S = 10.0
"""Between tries to claim an attempt on a disk that is full."""

CLEAR_S = 30.0
"""A node that cannot get rid of its old workers for this long is not waited for."""


class TooFewNodes(Exception):  # noqa: N818 - says what is the matter
    """Not enough nodes came in time."""


@dataclass
class Gathering:
    """From the end of one attempt, or the beginning of a run, until the next can start."""

    cfg: Launch
    since: float
    again: bool = False
    """There was an attempt before: nodes that are lost are not waited for if enough are left."""
    not_before: float = 0.0
    """Nothing starts before this time: faults in a row are followed by waits."""
    _enough_since: float | None = None

    def ready(self, members: Iterable[Member], now: float) -> list[Member]:
        """Return the nodes that an attempt can choose from; none while there is to be waited.

        Raises:
            TooFewNodes: if not enough came in `launch.join_s`.
        """
        there = list(members)
        ready = [member for member in there if member.port is not None]
        clearing = len(ready) < len(there) and now - self.since < CLEAR_S
        if now < self.not_before or (clearing and len(there) >= self.cfg.min_nodes):
            return []
        if len(ready) < self.cfg.min_nodes:
            self._enough_since = None
            if now - self.since > self.cfg.join_s:
                raise TooFewNodes(
                    f"{len(ready)} nodes were ready after launch.join_s {self.cfg.join_s:g}, and "
                    f"launch.nnodes {self.cfg.nnodes} needs {self.cfg.min_nodes}"
                )
            return []
        if self._enough_since is None:
            self._enough_since = now
        if self.again or len(ready) >= self.cfg.max_nodes:
            return ready
        return ready if now - self._enough_since >= LAST_CALL_S else []

    def is_forsaken(self, n_members: int, now: float) -> bool:
        """Whether the one that leads has been alone for long, after it was not."""
        alone = n_members == 1 < self.cfg.min_nodes
        return alone and self.again and now - self.since > GIVE_WAY_S
