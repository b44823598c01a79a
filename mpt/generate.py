"""Text out of a model, a token at a time: greedy or sampled, with no process group."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mpt.errors import CheckpointError, UsageError
from mpt.tokenizer import Tokenizer


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eod_id: int | None = None,
    n_ids: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, each as soon as it is known.

    The same arguments give the same ids. Every token reads the whole context anew: there is no
    cache of keys and values, so time grows with the square of the length.

    Args:
        model: tokens (1, S) -> logits (1, S, V), on any device.
        prompt_ids: may be empty if `eod_id` is given: then a new document begins.
        max_new_tokens: stop after as many, if the document has not ended before.
        context: tokens the model reads at most, its max_seq_len; of a longer text, the last ones.
            ALiBi would run on beyond the trained length, but transformers' MPT would not, and
            an export must behave here as it does there.
        temperature: logits are divided by it; 0 takes the likeliest id always.
        top_k: draw from the k likeliest ids only.
        top_p: draw from the fewest likeliest ids that have this much of the probability.
        eod_id: end of document: stops generation, and is not itself yielded.
        n_ids: draw ids below this only; the tokenizer's size, where the embedding has more rows.

    Raises:
        UsageError: if an argument makes no sense.
        CheckpointError: if the model's logits are not finite.
    """
    ids = list(prompt_ids) or ([] if eod_id is None else [eod_id])
    _check(ids, max_new_tokens, context, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = _next_logits(model, ids[-context:])[:n_ids]
        token = _draw(logits, temperature, top_k, top_p, generator)
        if token == eod_id:
            return
        yield token
        ids.append(token)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of `ids` piece by piece, never half a character.

    Joined, the pieces are `tokenizer.decode(ids)`: bytes that can no longer become a character
    come out as U+FFFD, the last ones at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if text := decoder.decode(tokenizer.token_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@torch.inference_mode()
def _next_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the logits of what follows `ids`, (V,) fp32 on the CPU, without dropout."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tokens = torch.tensor([ids], device=device)  # (1, S)
    logits: Tensor = model(tokens)[0, -1].float().cpu()
    model.train(was_training)
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("the model's logits are not finite; its weights are damaged.")
    return logits


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # In float64: a tiny temperature must not overflow, nor a long tail sum to less than one.
    ranked, order = (logits.double() / temperature).sort(descending=True, stable=True)
    probabilities = torch.softmax(ranked[:top_k], dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # of all likelier ids; 0 for the first
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    ids: list[int],
    max_new_tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not ids:
        raise UsageError("the prompt is empty, and no end-of-document id is given to begin with.")
    if max_new_tokens < 0 or context < 1:
        raise UsageError(f"{max_new_tokens} new tokens, {context} of context: these are no counts.")
    if not 0.0 <= temperature < float("inf"):
        raise UsageError(f"temperature {temperature} is not 0 (greedy) or a positive number.")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k {top_k} leaves no id to draw; use 1 or more, or none.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UsageError(f"top_p {top_p} is not a probability in (0, 1].")
