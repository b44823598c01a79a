"""How many workers on how many cores, and the environment they start in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

GLIBC_KEEPS_MEMORY = {
    # Large tensors come and go each step. By default glibc gives their pages back to the kernel
    # and takes them anew, zeroed; keeping them made a training step on CPU 20 to 25 % faster.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of NVIDIA, AMD and WSL leave in /dev."""


def n_workers(wanted: int | Literal["auto"], n_gpus: int) -> int:
    """Return the workers to start on this machine: as asked, or one per GPU, or one."""
    return max(1, n_gpus) if wanted == "auto" else wanted


def worker_environment(
    n_local_workers: int, n_cpus: int, n_gpus: int, given: Mapping[str, str]
) -> dict[str, str]:
    """Return what is added to each worker's environment; threads as `given`, if the user said."""
    threads = str(max(1, n_cpus // n_local_workers))
    environment = {
        "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", threads),
        "PYTHONUNBUFFERED": "1",
    }
    return environment if n_gpus else environment | GLIBC_KEEPS_MEMORY


def count_gpus() -> int:
    """Return the GPUs that torch can use here; asks a process of its own, if there is a driver.

    torch is not imported into the supervisor: it would take seconds, and memory for good.
    """
    if not any(Path(device).exists() for device in _GPU_DEVICES):
        return 0
    probe = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else 0


def gpu_names() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES would call each GPU that torch can use here."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(count_gpus())]
