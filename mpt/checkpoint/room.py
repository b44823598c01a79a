"""Host memory for copies: taken only where it is there, because what is not there kills."""

from __future__ import annotations

import errno
import os
from pathlib import Path

ROOM_SHARE = 0.5
"""Of the memory that is free at the start which copies may take: training comes for its own."""


def check_room(wanted: int) -> None:
    """Refuse before the kernel has to choose which process to kill.

    Raises:
        OSError: if the copies of this machine's ranks would take too much of what is free.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = int(ROOM_SHARE * _free_bytes())
    if wanted * local > room:
        why = f"{local} x {wanted / 2**30:.1f} GiB wanted, {room / 2**30:.1f} GiB may be taken"
        raise OSError(errno.ENOMEM, why)


def take_memory(descriptor: int, wanted: int) -> None:
    """Have the kernel set the memory aside now: missing, it would kill us at the first write.

    Raises:
        OSError: if it is not there; the kernel has given back what it had taken.
    """
    os.ftruncate(descriptor, 0)
    os.posix_fallocate(descriptor, 0, wanted)


def _free_bytes() -> int:
    """Return the memory that this machine has left, or its container if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # given up when needed
    except (OSError, ValueError, KeyError):  # there is no limit, or it says "max"
        return free
    return min(free, limit - used + cached)
