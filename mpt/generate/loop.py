"""Tokens out of a network, one at a time for each text of a batch, with cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch

from mpt.errors import UsageError
from mpt.generate.read import read_anew, read_on
from mpt.generate.sample import Sampling, draw
from mpt.generate.window import batches, context_problems, forgets, window_start
from mpt.model.network import MPT


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for."""

    tokens: int
    """Tokens to add to each text at most."""
    context: int
    """Tokens that the model sees at most."""
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """Texts to make of each prompt."""
    seed: int = 0
    batch: int = 8
    """Texts that are made at the same time."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these that it comes to hold."""

    def problems(self) -> Iterator[str]:
        """Yield what makes no sense, under the names of the command's options."""
        for name in ("tokens", "samples", "batch"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} is not a positive count"
        if "" in self.stop:
            yield "--stop '' is no text; every text holds it"
        yield from self.sampling.problems()


def check(network: MPT, options: Options) -> None:
    """Make sure that options make sense, and that the network can do what they ask for.

    Raises:
        UsageError: names all that do not.
    """
    context = context_problems(network.transformer.cfg, options.context)
    if wrong := [*options.problems(), *context]:
        raise UsageError("; ".join(wrong) + ".")


def put(
    network: MPT,
    device: Literal["auto", "cpu", "cuda"],
    dtype: Literal["fp32", "bf16"] | None = None,
) -> None:
    """Move a network to where it is to run; without a dtype, to bf16 on a GPU, fp32 on a CPU.

    Raises:
        UsageError: if there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; leave it out to use the CPU.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "bf16" if device == "cuda" else "fp32"
    network.to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def generate(
    network: MPT,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    n_ids: int | None = None,
    finished: set[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (sample, id) for each id that is added to a text, as soon as it is known.

    Sample s belongs to prompt s // options.samples. Its ids are a function of that prompt, of
    s % options.samples and of the options, `batch` excepted: what else is in the batch makes
    no difference, beyond how the last bits of logits are rounded.

    Args:
        prompts: ids; none is empty.
        n_ids: draw ids below this only; the tokenizer's size, where the embedding has more rows.
        finished: samples not to go on with. The caller may add to it at any time.

    Raises:
        UsageError: if an option or a prompt makes no sense.
        CheckpointError: if the network's logits are not finite.
    """
    check(network, options)
    if not all(prompts):
        raise UsageError("a prompt is empty: there is nothing to go on from.")
    finished = set() if finished is None else finished
    texts = [list(prompt) for prompt in prompts for _ in range(options.samples)]
    lengths = [len(text) for text in texts]
    for batch in batches(lengths, options.tokens, options.context, options.batch):
        yield from _go_on(network, {n: texts[n] for n in batch}, options, n_ids, finished)


def _go_on(
    network: MPT,
    texts: dict[int, list[int]],
    options: Options,
    n_ids: int | None,
    finished: set[int],
) -> Iterator[tuple[int, int]]:
    """Add ids to the texts of one batch, which see `finished` between any two."""
    randoms = {n: Random(f"{options.seed} {n % options.samples}") for n in texts}
    longest = max(map(len, texts.values())) + options.tokens - 1
    capacity = min(options.context, longest)
    cache = None
    for _ in range(options.tokens):
        if cache is None or any(forgets(len(ids), options.context) for ids in texts.values()):
            seen = [ids[window_start(len(ids), options.context) :] for ids in texts.values()]
            cache, logits = read_anew(network, seen, capacity)
        else:
            logits = read_on(network, [ids[-1] for ids in texts.values()], cache)
        for (number, ids), row in zip(texts.items(), logits, strict=True):
            ids.append(draw(row, ids, options.sampling, randoms[number].random(), n_ids))
            yield number, ids[-1]
        rows = [row for row, number in enumerate(texts) if number not in finished]
        if not rows:
            return
        if len(rows) < len(texts):
            cache.keep(rows)
            texts = {number: ids for number, ids in texts.items() if number not in finished}
