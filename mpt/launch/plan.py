"""How many workers on how many cores, and the environment they start in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mpt.recipe.attention import flash_is_installed
from mpt.recipe.machine import Machine, torchao_is_installed

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


def first_gpu(ranks_per_node: int) -> Machine:
    """Return what a rank on this machine's first GPU has; asks a process of its own, as above.

    Where there is none, or it does not say, it is one of 80 GB such as most have.
    """
    usual = Machine(
        device="cuda",
        name="a GPU of 80 GB",
        memory_bytes=80 * 10**9,
        has_bf16=True,
        has_compiler=True,
        has_float8=True,
        torchao_installed=True,
        ranks_per_node=ranks_per_node,
    )
    if not any(Path(device).exists() for device in _GPU_DEVICES):
        return usual
    probe = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps([p.name, "
        "p.total_memory, torch.cuda.is_bf16_supported(including_emulation=False), "
        "torch.cuda.get_device_capability(0) >= (8, 9)]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode != 0:
        return usual
    name, memory_bytes, has_bf16, has_float8 = json.loads(done.stdout)
    return replace(
        usual,
        name=name,
        memory_bytes=memory_bytes,
        has_bf16=has_bf16,
        has_float8=has_float8,
        flash_installed=flash_is_installed(),
        torchao_installed=torchao_is_installed(),
    )


def gpu_names() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES would call each GPU that torch can use here."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(count_gpus())]
