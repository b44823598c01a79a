"""What a device could do at best: the denominator of MFU."""

from __future__ import annotations

import time

import torch

DENSE_BF16_FLOPS = {
    "H100": 989.5e12,
    "H200": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "B200": 2250e12,
}
"""Vendors' dense bf16 figures, by a part of the device's name."""

_SIZE = 1024
_TRIES = 5


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s that one rank could reach, or None where nobody knows.

    GPUs: the vendor's dense bf16 figure. CPUs have none that means much, so it is measured:
    the best of a few matrix products in `dtype` on the threads this rank has, about 50 ms.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [flops for part, flops in DENSE_BF16_FLOPS.items() if part in name.split()]
        return known[0] if known else None
    a = torch.randn(_SIZE, _SIZE).to(dtype)
    a @ a  # the first product pays for packing and thread start
    best_s = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * _SIZE**3 / best_s
