"""Laws of writing weights: the format's own reader reads them, and memory does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpt.checkpoint.stream import Form, share_out, write_file
from mpt.checkpoint.weights import gather, pieces_in
from mpt.errors import CheckpointError
from mpt.hf.names import shapes_of
from mpt.recipe.model import Model

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)  # a file is on the disk before it returns
@given(
    forms=st.dictionaries(
        st.text('abcäé."\\', min_size=1, max_size=6), st.tuples(DTYPES, SHAPES), min_size=1
    )
)
def test_a_file_holds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    path = tmp_path_factory.mktemp("stream") / "weights.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in forms.items()}
    write_file(path, {name: Form(*form) for name, form in forms.items()}, tensors.__getitem__)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for entry in json.loads(raw[8 : 8 + length]).values():
        if "dtype" in entry:  # a reader may map the numbers where they lie
            width = 4 if entry["dtype"] == "F32" else 2
            assert entry["data_offsets"][0] % width == 0


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    form = {"a": Form(torch.float32, (2,))}
    write_file(tmp_path / "file", form, lambda _: torch.ones(2))
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", form, lambda _: torch.zeros(2))


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), shard_bytes=st.integers(1, 200))
def test_a_file_exceeds_its_size_only_for_a_single_tensor(
    sizes: list[int], shard_bytes: int
) -> None:
    forms = {f"t{i}": Form(torch.float32, (size,)) for i, size in enumerate(sizes)}
    groups = share_out(forms, shard_bytes)
    assert [name for group in groups for name in group] == list(forms)
    filled = [sum(forms[name].n_bytes for name in group) for group in groups]
    assert all(len(g) == 1 or size <= shard_bytes for g, size in zip(groups, filled, strict=True))
    for (size, _), (_, following) in pairwise(zip(filled, groups, strict=True)):
        assert size + forms[following[0]].n_bytes > shard_bytes  # no file could have held more


def test_any_rows_of_a_tensor_in_pieces_are_read_as_of_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(11, 3)
    cuts = {"b": whole[4:9], "a": whole[:4], "c": whole[9:]}
    save_file({name: part.contiguous() for name, part in cuts.items()}, tmp_path / "file")
    starts = {"a": 0, "b": 4, "c": 9}
    pieces = pieces_in(tmp_path / "file")
    placed = [("x", replace(piece, offset=(starts[piece.key], 0))) for piece in pieces]
    weights = gather(tmp_path, placed)
    assert weights.shapes == {"x": (11, 3)}
    assert torch.equal(weights.read("x"), whole)
    for start in range(11):
        for stop in range(start, 12):
            assert torch.equal(weights.read("x", (start, stop)), whole[start:stop])
    with pytest.raises(CheckpointError, match="is where the next one must begin"):
        gather(tmp_path, placed[:1] + placed[2:])
    narrow = [(name, replace(piece, shape=(piece.shape[0], 2))) for name, piece in placed[1:]]
    with pytest.raises(CheckpointError, match="is where the next one must begin"):
        gather(tmp_path, placed[:1] + narrow)


LAYERS = 6
BLOCK_BYTES = 12 * 1024 * 1024 * 4
PROBE = """
import resource, sys
from pathlib import Path

sys.modules["transformers"] = None  # no proof, which is a matter of its own
from mpt.checkpoint.weights import gather, pieces_in
from mpt.hf.export import export
from mpt.hf.importing import import_directory
from mpt.recipe.model import Model

model = Model(d_model=1024, n_heads=8, n_layers={layers}, max_seq_len=64, vocab_size=512)
here = Path(sys.argv[1])
weights = gather(here, ((p.key, p) for p in pieces_in(here / "weights.safetensors")))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(weights, model, None, here / "hf", dtype="bf16", shard_bytes={shard_bytes})
import_directory(here / "hf", here / "ours", shard_bytes={shard_bytes})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_a_shard_however_large_the_model(tmp_path: Path) -> None:
    model = Model(d_model=1024, n_heads=8, n_layers=LAYERS, max_seq_len=64, vocab_size=512)
    table, end = {}, 0
    for name, shape in shapes_of(model).items():
        size = prod(shape) * 4
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with (tmp_path / "weights.safetensors").open("wb") as file:  # zeros, of which none is on disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    shard_bytes = BLOCK_BYTES // 2  # a block, as bf16
    probe = PROBE.format(layers=LAYERS, shard_bytes=shard_bytes)
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= LAYERS
    growth = int(done.stdout)
    assert end > LAYERS * BLOCK_BYTES
    assert growth < LAYERS / 2 * BLOCK_BYTES  # about one and a half were seen, of any number
