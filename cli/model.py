"""`mpt export` and `mpt import`: a model out of its run, and one from elsewhere."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mpt.errors import UsageError

from . import render

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Format(StrEnum):
    """Who is to read an export."""

    hf = "hf"
    gguf = "gguf"


class Dtype(StrEnum):
    """What exported weights are stored as."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run, a checkpoint or an exported directory.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new directory; for gguf also a file, X.gguf.")
    ],
    format: Annotated[
        Format | None,
        typer.Option(help="transformers', or llama.cpp's; follows from OUT ending in .gguf."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; as they are stored.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    unproved: Annotated[
        bool, typer.Option("--unproved", help="Go on where transformers is not installed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the weights in another program's format, and prove that it computes the same."""
    from mpt.hf.source import open_checkpoint

    if format is None:
        format = Format.gguf if out.suffix == ".gguf" else Format.hf
    if format is Format.hf and not unproved and find_spec("transformers") is None:
        raise UsageError(
            "an export proves itself in transformers, which is not installed: "
            "pip install 'mpt-train[hf]', or say --unproved."
        )
    opened = open_checkpoint(source)
    render.passed_over(opened.passed_over)
    from mpt.hf import export as to_hf

    parts = opened.weights, opened.model, opened.tokenizer_file, out
    if format is Format.hf:
        done = to_hf.export(
            *parts, dtype=None if dtype is None else dtype.value, overwrite=overwrite
        )
    else:
        from mpt.hf.gguf import export_gguf

        matrices = to_hf.stored_dtype(opened.weights) if dtype is None else dtype.value
        card = partial(to_hf.card_of, opened.weights, opened.model, format="gguf", dtype=matrices)
        done = export_gguf(*parts, dtype=matrices, overwrite=overwrite, card=card)
    render.exported(done, as_json)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="An MPT or Llama model, as safetensors.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    as_json: AsJson = False,
) -> None:
    """Turn a directory in Hugging Face's format into a checkpoint to train on from."""
    from mpt.hf.importing import import_directory

    render.imported(import_directory(source, out_dir), as_json)
