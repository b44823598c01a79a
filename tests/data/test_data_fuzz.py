"""Law of mutants: 20,000 indexes and shards are read or refused with DataError, nothing else.

They are read in a process of its own under limits of memory and CPU time, so that a crash is seen,
and an audit hook notes each path that is opened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.cases import write_dataset
from tests.data.faults import compress
from tests.data.test_data_hostile import shard_bytes

N_CASES = {"index": 10_000, "shard": 8_000, "fixed": 2_000, "zipped": 2_000}
MEMORY_BYTES = 256 << 20
"""That a case may take beyond what the imports took."""
CPU_S = 120

READING = """
import json, os, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from mpt.data.dataset import open_dataset
from mpt.errors import DataError
from mpt.recipe.data import Cache
from tests.data import test_data_fuzz as fuzz
from tests.data.mutants import Mutants

kind, folder, cache = sys.argv[2], sys.argv[3], sys.argv[4]
case = None
opened = set()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + fuzz.MEMORY_BYTES,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (fuzz.CPU_S,) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24,) * 2)
os.chdir("/")

def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.truncate", "os.remove", "os.rename"):
        if isinstance(arguments[0], (str, bytes, os.PathLike)):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))

def read(dataset):
    sizes = dataset.shard_sizes
    for shard in np.flatnonzero(sizes)[:3].tolist():
        for row in {0, int(sizes[shard]) // 2, int(sizes[shard]) - 1}:
            dataset.rows(np.full(1, shard), np.full(1, row))
        if len(sizes) and sizes[shard] <= 64:
            opened_shard = dataset.open_shard(shard)
            for row in range(len(opened_shard)):
                opened_shard.sample(row)

counts = {"read": 0, "refused": 0}
mutants = Mutants(kind, Path(folder))
sys.addaudithook(note)
for case in range(fuzz.N_CASES[kind]):
    mutants.write(case)
    opened.clear()
    try:
        read(open_dataset(folder, Cache(dir=cache)))
        counts["read"] += 1
    except DataError as error:
        assert folder in str(error), f"case {case}: {error}"
        assert "\\n" not in str(error) and len(str(error)) < 2000, f"case {case}: {error!r}"
        counts["refused"] += 1
    except BaseException:
        print(kind, "case", case, file=sys.stderr)
        raise
    outside = [p for p in opened if not p.startswith((folder + "/", cache)) and p != folder]
    assert not outside, f"case {case} opened {outside}"
print(json.dumps(counts))
"""


@pytest.mark.parametrize("kind", N_CASES)
def test_no_mutant_is_more_than_refused(kind: str) -> None:
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as place:
        name = os.path.realpath(place)
        folder = Path(name, "set")
        samples = np.arange(48).reshape(12, 4)
        write_dataset(folder, samples, per_shard=4)
        if kind == "shard":
            _vary_encodings(folder)
        if kind == "zipped":
            compress(folder, keep_hashes=False)
        Path(name, "outside.mds").write_bytes((next(folder.glob("shard.*"))).read_bytes())
        (folder / "link.mds").symlink_to(Path(name, "outside.mds"))
        (folder / "folder").mkdir()
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", READING, str(root), kind, str(folder), f"{name}/cache"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
        counts = json.loads(done.stdout)
        assert min(counts.values()) > N_CASES[kind] // 250, counts


def _vary_encodings(folder: Path) -> None:
    """Put shards in place whose samples each say what they are, in three encodings."""
    index = json.loads((folder / "index.json").read_text())
    values = np.arange(4, dtype="<i8").tobytes()
    samples = {
        "ndarray:int32": bytes([4, 4]) + np.arange(4, dtype="<i4").tobytes(),
        "ndarray": bytes([65, 4, 4]) + values,
        "bytes": values,
    }
    for entry, (encoding, sample) in zip(index["shards"], samples.items(), strict=True):
        payload = shard_bytes([len(sample).to_bytes(4, "little") + sample] * 4, encoding=encoding)
        (folder / entry["raw_data"]["basename"]).write_bytes(payload)
        entry["raw_data"] |= {"bytes": len(payload), "hashes": {}}
        entry["column_encodings"], entry["column_sizes"] = [encoding], [None]
    (folder / "index.json").write_text(json.dumps(index))
