"""`mpt export` and `mpt generate`: a trained model, out of its run."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import render

Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="A run, a checkpoint or an exported directory."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Dtype(StrEnum):
    """What exported weights are stored as."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run or a checkpoint.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new directory.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the stored weights.")] = Dtype.fp32,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the weights in Hugging Face's format, and prove that transformers computes the same."""
    from mpt.hf.source import open_checkpoint

    opened = open_checkpoint(source)
    render.passed_over(opened.passed_over)
    from mpt.hf.export import export as export_model

    done = export_model(
        opened.weights,
        opened.model,
        opened.tokenizer_file,
        out_dir,
        dtype=dtype.value,
        overwrite=overwrite,
    )
    render.exported(done, as_json)


def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this much probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from mpt.generate import generate as generate_ids
    from mpt.generate import stream_text
    from mpt.hf.source import open_source

    loaded = open_source(source)
    ids = generate_ids(
        loaded.network,
        loaded.tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        context=loaded.model.max_seq_len,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eod_id=loaded.tokenizer.eod_id,
        n_ids=loaded.tokenizer.vocab_size,
    )
    pieces = stream_text(ids, loaded.tokenizer)
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "text": "".join(pieces)}))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
