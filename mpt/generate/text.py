"""Tokens as text, piece by piece: whole characters only, and nothing of a text that stops it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from mpt.generate.loop import Options, generate
from mpt.model.network import MPT
from mpt.tokenizer import Tokenizer

Finish = Literal["length", "eod", "stop"]
"""Why a text ended: as many tokens as asked for, the document's own end, a stop text."""


class Piece(NamedTuple):
    """Something new of one text."""

    sample: int
    """Of prompt sample // options.samples."""
    text: str
    n_tokens: int
    """Tokens that were added to this text so far."""
    finish: Finish | None = None
    """Set on the last piece of a text, which may hold nothing else."""


class Writer:
    """Makes text of the tokens of one sample.

    Joined, what it gives is the decoded text up to where it first holds a stop text. Bytes that
    can no longer become a character come out as U+FFFD.

    Args:
        spell: the UTF-8 bytes of a token, possibly part of a character.
    """

    def __init__(self, spell: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._spell, self._stops = spell, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may yet be the beginning of a stop text

    def take(self, token: int) -> str:
        """Return what is certain to belong to the text now."""
        self._held += self._decoder.decode(self._spell(token))
        return self._give(self._n_uncertain())

    def end(self) -> str:
        """Return the rest, once no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._give(0)

    def _give(self, n_uncertain: int) -> str:
        """Return what is held, up to a stop text or to the last characters that are uncertain."""
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            # What a reader of single characters would have come upon first, the longer if two.
            at, _ = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            text, self._held, self.stopped = self._held[:at], "", True
        else:
            sure = len(self._held) - n_uncertain
            text, self._held = self._held[:sure], self._held[sure:]
        return text

    def _n_uncertain(self) -> int:
        """Characters at the end of what is held that a stop text begins with."""
        most = max(map(len, self._stops), default=0)
        for n in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


def continue_texts(
    network: MPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], options: Options
) -> Iterator[Piece]:
    """Yield what follows each prompt, as soon as it is known.

    Pieces of texts that are made together come in turn. An empty prompt begins a document.

    Raises:
        UsageError: if an option makes no sense, or is none for this network.
        CheckpointError: if the network's logits are not finite.
    """
    finished: set[int] = set()
    n_samples = len(prompts) * options.samples
    writers = [Writer(tokenizer.token_bytes, options.stop) for _ in range(n_samples)]
    counts = [0] * n_samples
    begun = [ids or [tokenizer.eod_id] for ids in prompts]
    n_ids = tokenizer.vocab_size
    for sample, token in generate(network, begun, options, n_ids=n_ids, finished=finished):
        writer, ended = writers[sample], token == tokenizer.eod_id
        counts[sample] += not ended
        text = "" if ended else writer.take(token)
        finish: Finish | None = None
        if ended or counts[sample] == options.tokens:
            text += writer.end()
            finish = "eod" if ended else "length"
        if writer.stopped:
            finish = "stop"
        if finish is not None:
            finished.add(sample)
        if text or finish is not None:
            yield Piece(sample, text, counts[sample], finish)
