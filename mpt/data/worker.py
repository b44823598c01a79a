"""A process that tokenizes for another, over a socket: `python -m mpt.data.worker`.

A request is a frame of JSON, {wanted, sizes}, and a frame of the texts, one after the other. The
answer is a frame of JSON, by split [documents, text bytes, tokens] or {error}, and a frame of ids.
The first frame of all is the worker's: {sha256} of its tokenizer, or {error}.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mpt.data.encode import Encoder
from mpt.errors import MptError
from mpt.tokenizer import load_tokenizer

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the other side closes the socket, or dies."""
    descriptor, parent, tokenizer, eval_fraction = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        return
    line = Connection(int(descriptor))
    try:
        encoder = Encoder(load_tokenizer(Path(tokenizer)), float(eval_fraction))
    except MptError as error:
        _send(line, {"error": str(error)})
        return
    _send(line, {"sha256": encoder.tokenizer.sha256})
    while True:
        try:
            head = json.loads(line.recv_bytes())
            payload = memoryview(line.recv_bytes())
        except (EOFError, ConnectionError):
            return
        _answer(line, encoder, head, payload)


def _answer(line: Connection, encoder: Encoder, head: dict[str, Any], payload: memoryview) -> None:
    cuts = pairwise(accumulate(head["sizes"], initial=0))
    try:
        found = encoder.encode([bytes(payload[a:b]) for a, b in cuts], head["wanted"])
    except (MptError, MemoryError) as error:
        _send(line, {"error": str(error) or "out of memory"})
        return
    _send(line, {s: [e.documents, e.text_bytes, len(e.tokens)] for s, e in found.items()})
    line.send_bytes(b"".join(encoded.tokens.tobytes() for encoded in found.values()))


def _send(line: Connection, message: dict[str, Any]) -> None:
    line.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()
