"""`mpt generate`: what a trained model has to say."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpt.errors import UsageError

from . import render

if TYPE_CHECKING:
    from mpt.generate.text import Piece


class Device(StrEnum):
    """Where a model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """What a model computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A run, a checkpoint or an exported directory.")
]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to go on from.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help='Prompts, a line each, or lines of {"prompt": "..."}.'
    ),
]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest.")]
TopP = Annotated[float | None, typer.Option(help="Draw from this much probability.")]
MinP = Annotated[float | None, typer.Option(help="At least this fraction as likely as the top.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Context = Annotated[int | None, typer.Option(help="Tokens the model sees; its own by default.")]
Dtype = Annotated[Precision | None, typer.Option(help="By default bf16 on a GPU, fp32 on a CPU.")]


def generate(
    source: Source,
    prompt: Prompt = None,
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    samples: Annotated[int, typer.Option(help="Texts to make of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    context: Context = None,
    batch: Annotated[int, typer.Option(help="Texts to make at the same time.")] = 8,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a text.")] = False,
) -> None:
    """Continue a prompt, or many; the text of a single one appears as it is made."""
    from mpt.generate.loop import Options, check, put
    from mpt.generate.sample import Sampling
    from mpt.generate.text import continue_texts
    from mpt.generate.window import remarks
    from mpt.hf.source import open_source

    texts = _texts(prompt, prompts)
    loaded = open_source(source)
    render.passed_over(loaded.passed_over)
    options = Options(
        tokens=tokens,
        context=loaded.model.max_seq_len if context is None else context,
        sampling=Sampling(
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        ),
        samples=samples,
        seed=seed,
        batch=batch,
        stop=tuple(stop or ()),
    )
    check(loaded.network, options)
    put(loaded.network, device.value, None if dtype is None else dtype.value)
    ids = [loaded.tokenizer.encode(text) for text in texts]
    for remark in remarks(loaded.model, options.context, max(map(len, ids)) + tokens):
        render.tell(remark)
    pieces = continue_texts(loaded.network, loaded.tokenizer, ids, options)
    _show(pieces, [text for text in texts for _ in range(samples)], samples, as_json)


def _texts(prompt: str | None, path: Path | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise UsageError(
            "give either a PROMPT or --prompts FILE; `--prompts -` reads standard input."
        )
    if path is None:
        return [prompt or ""]
    from mpt.generate.prompts import read_prompts

    return read_prompts(path)


def _show(pieces: Iterator[Piece], prompts: list[str], samples: int, as_json: bool) -> None:
    """Write texts on stdout, of which `prompts` has each one's beginning, in their order."""
    begun = time.monotonic()
    n_tokens = 0
    alone = len(prompts) == 1 and not as_json
    if alone:
        _write(prompts[0])
    texts = [""] * len(prompts)
    done: dict[int, Piece] = {}
    shown = 0
    for piece in pieces:
        texts[piece.sample] += piece.text
        if alone:
            _write(piece.text)
        if piece.finish is not None:
            done[piece.sample] = piece
            n_tokens += piece.n_tokens
        while shown in done:
            last, text = done.pop(shown), texts[shown]
            if as_json:
                _write(_record(prompts[shown], text, last, samples))
            elif not alone:
                _write(f"=== prompt {shown // samples + 1}, sample {shown % samples + 1}\n")
                _write(prompts[shown] + text)
            _write("\n")
            shown += 1
    if sys.stderr.isatty():
        elapsed_s = time.monotonic() - begun
        rate = n_tokens / elapsed_s
        render.tell(f"{n_tokens:,} tokens in {elapsed_s:.1f} s, {rate:,.1f} tokens/s.")


def _record(prompt: str, text: str, last: Piece, samples: int) -> str:
    return json.dumps(
        {
            "prompt": prompt,
            "sample": last.sample % samples,
            "text": text,
            "n_tokens": last.n_tokens,
            "finish": last.finish,
        }
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
