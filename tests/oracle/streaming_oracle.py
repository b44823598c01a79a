"""mosaicml-streaming itself, writing datasets for ours to read, and reading those ours wrote.

python streaming_oracle.py write OUT_DIR          # a dataset a case, with its samples in X.npy
python streaming_oracle.py read DATASET OUT.npy   # all samples, every shard's sha256 checked
python streaming_oracle.py version
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import without_vision  # noqa: F401
from streaming import MDSWriter, StreamingDataset, __version__

LENGTH, N_SAMPLES, SHARD_BYTES = 40, 50, 2048
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
Options = dict[str, Any]


def cases() -> dict[str, tuple[str, Options]]:
    """Return encoding of `tokens` and the writer's options by the name of a case."""
    found: dict[str, tuple[str, Options]] = {"bytes": ("bytes", {})}
    for dtype in DTYPES:
        found[f"any-{dtype}"] = ("ndarray", {})
        found[f"{dtype}"] = (f"ndarray:{dtype}", {})
        found[f"{dtype}-fixed"] = (f"ndarray:{dtype}:{LENGTH}", {"hashes": ["sha256"]})
    for compression in ("zstd", "zstd:1", "zstd:19"):
        for hashes in ([], ["sha256"], ["xxh64"], ["blake2b", "md5", "sha1", "sha3_256", "xxh128"]):
            name = "-".join([compression.replace(":", ""), *hashes])
            found[name] = (
                f"ndarray:uint16:{LENGTH}",
                {"compression": compression, "hashes": hashes},
            )
    return found


def write(folder: Path) -> None:
    """Write every case's dataset, of several shards, and its samples."""
    for number, (name, (encoding, options)) in enumerate(cases().items()):
        dtype = "int64" if encoding == "bytes" else _dtype_of(name, encoding)
        limits = np.iinfo("uint16" if encoding == "bytes" else dtype)
        samples = np.random.default_rng(number).integers(
            limits.min, limits.max, (N_SAMPLES, LENGTH), dtype, endpoint=True
        )
        np.save(folder / f"{name}.npy", samples)
        with MDSWriter(
            out=str(folder / name),
            columns={"tokens": encoding},
            size_limit=SHARD_BYTES,
            **options,
        ) as writer:
            for sample in samples:
                writer.write({"tokens": sample.tobytes() if encoding == "bytes" else sample})


def read(folder: Path, out: Path) -> None:
    """Read a dataset as from afar, so that hashes are checked and zstd is decompressed."""
    with tempfile.TemporaryDirectory() as local:
        dataset = StreamingDataset(
            remote=str(folder), local=local, batch_size=1, shuffle=False, validate_hash="sha256"
        )
        np.save(out, np.stack([sample["tokens"].astype(np.int64) for sample in dataset]))


def _dtype_of(name: str, encoding: str) -> str:
    return name.removeprefix("any-") if encoding == "ndarray" else encoding.split(":")[1]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder))
        case ["read", folder, out]:
            read(Path(folder), Path(out))
        case ["version"]:
            print(__version__)
        case _:
            raise SystemExit(__doc__)
