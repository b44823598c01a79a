"""Laws of resuming: any position costs what the first one costs, in time and in memory."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import gc, json, time
import numpy as np
from mpt.data.mixture import Mixture
from mpt.data.order import Order, share

def peak_bytes():
    # Not getrusage: its figure is that of the parent, if that was more before the exec.
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

def resume_s(position):
    gc.collect()  # of the order before
    began = time.perf_counter()
    order = Order([sizes], Mixture.constant([1.0]), seed=17)  # nothing is kept from before
    batch = order.locate(np.arange(position, position + 1024))
    share(batch, range(3, 4), 64)
    order.windows_ahead(position)
    return time.perf_counter() - began

sizes = np.full(611_000, 16_368)  # 10**10 samples in shards of 64 MiB
resume_s(0)
before = peak_bytes()
pairs = [(resume_s(0), resume_s(10**9)) for _ in range(5)]
print(json.dumps({
    "samples": int(sizes.sum()),
    "at_0_s": min(pair[0] for pair in pairs),
    "at_1e9_s": min(pair[1] for pair in pairs),
    "bytes": peak_bytes(),
    "more_bytes": peak_bytes() - before,
}))
"""


def test_resuming_at_a_billionth_of_ten_billion_samples_costs_what_the_start_costs() -> None:
    output = subprocess.check_output([sys.executable, "-c", PROBE], text=True)
    found = json.loads(output)
    assert found["samples"] >= 10**10
    assert found["at_1e9_s"] < 3 * found["at_0_s"]
    assert found["bytes"] < 100 * 10**6  # the whole process, numpy included
    assert found["more_bytes"] < 10**7
