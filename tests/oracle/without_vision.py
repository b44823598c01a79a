"""Lets mosaicml-streaming be imported where torchvision does not fit torch: text needs no vision.

The package index has torchvision built for CUDA only, which does not load beside a CPU build.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

VISION: dict[str, dict[str, object]] = {
    "torchvision": {},
    "torchvision.datasets": {"VisionDataset": object},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"to_tensor": None},
}

for name, words in VISION.items():
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(words)
    sys.modules[name] = module
