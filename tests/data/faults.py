"""A server of a directory over HTTP that fails on command, and datasets to serve."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from mpt.recipe.data import Cache
from tests.data.cases import write_dataset

LENGTH = 4


@dataclass
class FaultyServer:
    """Serves a directory; `faults` holds, per file name, what happens to its next requests."""

    directory: Path
    faults: dict[str, list[str]] = field(default_factory=dict)
    """fault, or fault that stays for ever where it ends in "!"."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(file name, Range) of each request, in order."""
    headers: list[dict[str, str]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set once a request hangs."""
    go_on: threading.Event = field(default_factory=threading.Event)
    """Set it to let requests that hang end."""
    url: str = ""

    def next_fault(self, name: str) -> str:
        queue = self.faults.get(name) or [""]
        return queue[0].rstrip("!") if queue[0].endswith("!") else queue.pop(0)

    def asked(self, name: str) -> list[str | None]:
        return [wanted for file, wanted in self.requests if file == name]


@contextmanager
def serving(directory: Path) -> Iterator[FaultyServer]:
    """Serve a directory on this machine."""
    state = FaultyServer(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, state)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield state
    finally:
        state.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def answer(request: BaseHTTPRequestHandler, state: FaultyServer) -> None:
    """Send a file, or do what is wrong with it."""
    name = request.path.partition("?")[0].lstrip("/")
    wanted = request.headers.get("Range")
    state.requests.append((name, wanted))
    state.headers.append(dict(request.headers))
    fault, file = state.next_fault(name), state.directory / name
    if fault.isdigit() or not file.is_file():
        request.send_error(int(fault or 404))
        return
    payload = file.read_bytes()
    match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
    start = int(match[1]) if match and fault != "no range" else 0
    if start >= len(payload):
        request.send_error(416)
        return
    request.send_response(206 if start else 200)
    if start:
        place = start + (fault == "another range")
        request.send_header("Content-Range", f"bytes {place}-{len(payload) - 1}/{len(payload)}")
    if fault == "corrupt":
        payload = payload[:-1] + bytes([payload[-1] ^ 1])
    if fault == "longer":
        payload += b"x"
    if fault == "shorter":
        payload = payload[:-1]
    request.send_header("ETag", f'"{sha256(payload).hexdigest()[:8]}"')
    request.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
    if fault != "endless":
        said = {"says less": -1, "says more": 1}.get(fault, 0)
        request.send_header("Content-Length", str(len(payload) - start + said))
    request.end_headers()
    body, half = payload[start:], (len(payload) - start) // 2
    if fault == "other bytes":
        body = payload[: len(body)]
    match fault:
        case "truncate":
            request.wfile.write(body[:half])
        case "reset":
            request.wfile.write(body[:half])
            linger = struct.pack("ii", 1, 0)  # closing then resets the connection
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        case "hang":
            request.wfile.write(body[:half])
            state.stalled.set()
            state.go_on.wait()
        case "drip":
            with suppress(OSError):  # the reader has gone
                for i in range(len(body)):
                    request.wfile.write(body[i : i + 1])
                    state.go_on.wait(0.02)
        case "endless":
            with suppress(OSError):
                while not state.go_on.is_set():
                    request.wfile.write(body)
        case _:
            request.wfile.write(body)
    request.close_connection = True
    if fault == "reset":
        request.connection.close()


def counting(n: int, length: int = LENGTH) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(n * length, dtype=np.int64).reshape(n, length) % 300


def compress(folder: Path, *, level: int | None = None, keep_hashes: bool = True) -> Path:
    """Compress the shards of a dataset as mosaicml-streaming does."""

    def change(entry: dict[str, Any]) -> None:
        raw = folder / entry["raw_data"]["basename"]
        payload = zstandard.ZstdCompressor(level=level or 3).compress(raw.read_bytes())
        raw.unlink()
        packed = raw.with_name(raw.name + ".zstd")
        packed.write_bytes(payload)
        hashes = {"sha256": sha256(payload).hexdigest()} if keep_hashes else {}
        entry["compression"] = "zstd" if level is None else f"zstd:{level}"
        entry["zip_data"] = {"basename": packed.name, "bytes": len(payload), "hashes": hashes}
        if not keep_hashes:
            entry["raw_data"]["hashes"] = {}

    return edit_index(folder, change)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change every shard's entry in a dataset's index."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        change(entry)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def small_dataset(folder: Path, n: int = 20, *, per_shard: int = 7) -> Path:
    write_dataset(folder, counting(n), per_shard=per_shard)
    return folder


def files_in(cache: Path) -> list[str]:
    """Kinds of the files in a cache, sorted."""
    return sorted(path.suffix for path in (cache / "shards").iterdir() if path.suffix != ".TAG")


def cache_in(tmp_path: Path, **settings: Any) -> Cache:
    """A cache of a test's own, which gives up soon."""
    return Cache(**{"dir": f"{tmp_path}/cache", "deadline_s": 20.0, **settings})
