"""Reads batches with mosaicml-streaming, as many as each line of its input says, and times them.

python streaming_speed.py DATASET WORKERS BATCH_SIZE
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import without_vision  # noqa: F401
from streaming import StreamingDataset
from torch.utils.data import DataLoader


def collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    """Return tokens (B, S) int64, as llm-foundry makes them."""
    return torch.stack([torch.from_numpy(s["tokens"].astype(np.int64)) for s in samples])


def cpu_s() -> float:
    """Return the seconds of the CPU's work here and in the workers."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def batches(loader: DataLoader[Any]) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def main() -> None:
    folder, n_workers, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dataset = StreamingDataset(local=folder, batch_size=batch_size, shuffle=True)
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=n_workers, collate_fn=collate, drop_last=True
    )
    source = batches(loader)
    next(source)
    print("ready", flush=True)
    for line in sys.stdin:
        time.sleep(0.5)  # until the workers have nothing left to do
        begun, before = time.perf_counter(), cpu_s()
        for _ in range(int(line)):
            assert len(next(source)) == batch_size
        print(time.perf_counter() - begun, cpu_s() - before, flush=True)
    os._exit(0)  # the dataset's threads may outlive it


if __name__ == "__main__":
    main()
