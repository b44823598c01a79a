"""A process that tokenizes for another, over a socket: `python -m mpt.data.worker`.

A request is a frame of JSON, {wanted, sizes}, and a frame of the texts, one after the other. The
answer is a frame of JSON, what Job.pack gives or {error}, and a frame of arrays.
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

from mpt.data.curate.judge import Judge
from mpt.data.encode import Encoder
from mpt.errors import MptError
from mpt.tokenizer import load_tokenizer

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the other side closes the socket, or dies."""
    descriptor, parent, tokenizer, *told = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        return
    line = Connection(int(descriptor))
    try:
        job = _job(Path(tokenizer), *told)
    except MptError as error:
        _send(line, {"error": str(error)})
        return
    _send(line, {"sha256": job.tokenizer.sha256})
    while True:
        try:
            head = json.loads(line.recv_bytes())
            payload = memoryview(line.recv_bytes())
        except (EOFError, ConnectionError):
            return
        _answer(line, job, head, payload)


def _job(tokenizer: Path, eval_fraction: str, *curation: str) -> Encoder | Judge:
    encoder = Encoder(load_tokenizer(tokenizer), float(eval_fraction))
    return Judge.of_arguments(encoder, float(eval_fraction), curation) if curation else encoder


def _answer(
    line: Connection, job: Encoder | Judge, head: dict[str, Any], payload: memoryview
) -> None:
    cuts = pairwise(accumulate(head["sizes"], initial=0))
    try:
        texts = [bytes(payload[a:b]) for a, b in cuts]
        answer, arrays = job.pack(job.encode(texts, head["wanted"]))  # type: ignore[arg-type]
    except (MptError, MemoryError) as error:
        _send(line, {"error": str(error) or "out of memory"})
        return
    _send(line, answer)
    line.send_bytes(arrays)


def _send(line: Connection, message: dict[str, Any]) -> None:
    line.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()
