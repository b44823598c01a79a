"""What a rank has to train with, as far as choices hang on it. No torch."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mpt.recipe.attention import Device

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What matters of the device that one rank has."""

    device: Device
    name: str = ""
    """What its maker calls it."""
    memory_bytes: int
    """All of it, not what happens to be free: a resumed run must choose as it did before, or its
    sums are in another order and its bits differ."""
    has_bf16: bool
    """In hardware."""
    has_compiler: bool
    """One that torch.compile can use."""
    has_float8: bool = False
    """In hardware: of compute capability 8.9 or later."""
    flash_installed: bool = False
    torchao_installed: bool = False
    ranks_per_node: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return what two machines have in common that may choose alike.

        Memory is in whole GiB: a kernel keeps a few pages more or fewer to itself at each boot.
        """
        found = asdict(self)
        memory_gib = round(found.pop("memory_bytes") / GIB)
        return {**found, "memory_gib": memory_gib}


def this_cpu(ranks_per_node: int) -> Machine:
    """Return what each of so many ranks has on this machine without GPUs."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = cpu_info("flags")
    return Machine(
        device="cpu",
        name=cpu_info("model name") or platform.machine(),
        memory_bytes=min(host, _container_limit_bytes()) // ranks_per_node,
        has_bf16="avx512_bf16" in flags.split(),
        has_compiler=shutil.which("g++") is not None,
        ranks_per_node=ranks_per_node,
    )


def cpu_info(key: str) -> str:
    """Return what the kernel says of the first core, or nothing where it does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def torchao_is_installed() -> bool:
    """Return whether there is a torchao; nothing is imported."""
    try:
        return bool(version("torchao"))
    except PackageNotFoundError:
        return False


def _container_limit_bytes() -> int:
    """The memory limit of this container (cgroup v2), which the kernel's total does not know."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return 1 << 62
