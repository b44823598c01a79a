"""A rank of a measurement: python -m mpt.bench.worker RECIPE RESULT STEPS WARMUP random|real."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from mpt.errors import MptError
from mpt.storage import atomic_write

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Measure, and leave the figures in a file; exit codes are those of `mpt`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    recipe_file, result, steps, warmup, data = sys.argv[1:]
    import torch

    from mpt import recipe
    from mpt.bench.measure import measure
    from mpt.dist import process_group

    torch.set_flush_denormal(True)  # as in training
    cfg = recipe.load(Path(recipe_file))
    try:
        with process_group() as ranks:
            found = measure(cfg, ranks, steps=int(steps), warmup=int(warmup), real=data == "real")
            if ranks.is_first:
                atomic_write(Path(result), json.dumps(found))
    except MptError as error:
        print(f"mpt: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
