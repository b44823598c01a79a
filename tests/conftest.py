"""Fixtures that more than one room of tests uses."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two test processes with two threads each on two cores
# spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("mpt", deadline=None)
settings.load_profile("mpt")
