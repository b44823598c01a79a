"""One request for a file at a URL, from some byte on, and what its failure means."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import mpt
from mpt.storage import without_secrets

PASSING_STATUS = (408, 425, 429)
"""Of the answers from 400 to 499, those that ask to come again; so does every one from 500 on."""
BLOCK_BYTES = 1 << 20
VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
"""What fsspec's backends call what changes with a file."""
CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", re.ASCII)


class TransientError(Exception):
    """What was asked may work a moment later: a reset, a timeout, a server that is overloaded."""


class RestartError(TransientError):
    """The server cannot go on from where we are; from the start of the file it may."""


class RefusedError(Exception):
    """Asking again does not help: not there, not allowed, no such server."""


@dataclass(frozen=True)
class Answer:
    """The bytes of a file, as they come in."""

    start: int
    """The first byte's place in the file: 0 where the server knows no ranges."""
    total: int | None
    """Bytes of the whole file, or null where the server does not say."""
    version: str | None
    """Changes when the file does; null where the server does not say."""
    read: Callable[[], bytes]
    """Returns what has come in, of BLOCK_BYTES at most; nothing at the end."""


@contextmanager
def ask(url: str, start: int, timeout_s: float) -> Iterator[Answer]:
    """Open a URL to be read from byte `start` on.

    Args:
        timeout_s: for each wait on an http server; the others have limits of their own.

    Raises:
        TransientError, RefusedError: here, or while reading; no secret of the URL is in the text.
    """
    with ExitStack() as stack:
        with _judged(url):
            opened = _ask_http if urlsplit(url).scheme in ("http", "https") else _ask_fsspec
            answer = stack.enter_context(opened(url, start, timeout_s))

        def read() -> bytes:
            with _judged(url):
                return answer.read()

        yield replace(answer, read=read)


def file_url(directory: str, name: str) -> str:
    """Return the URL of a file in the directory at a URL; a query, such as a signature, stays."""
    parts = urlsplit(directory)
    if parts.scheme not in ("http", "https"):
        return f"{directory.rstrip('/')}/{name}"
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


@contextmanager
def _judged(url: str) -> Iterator[None]:
    """Turn what a library raises into one of our two errors."""
    try:
        yield
    except (TransientError, RefusedError):
        raise
    except Exception as error:  # each fsspec backend raises errors of its own
        if without_secrets(url) == url:
            raise _kind(error)(f"{type(error).__name__}: {error}") from error
        raise _kind(error)(type(error).__name__) from None  # the text may tell the secret


@contextmanager
def _ask_http(url: str, start: int, timeout_s: float) -> Iterator[Answer]:
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    request.add_header("Accept-Encoding", "identity")
    request.add_header("User-Agent", f"mpt/{mpt.__version__}")
    if login:
        word = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = _opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with closing(error):
            what = f"the server answers {error.code} {error.reason}"
        if error.code == 416 and start:  # it has no such byte: what is here is not of this file
            raise RestartError from error
        passing = error.code in PASSING_STATUS or error.code >= 500
        raise (TransientError if passing else RefusedError)(what) from error
    with closing(response):
        begin, total = _extent(response, start)
        version = _version(response.headers, ("ETag", "Last-Modified"))
        yield Answer(begin, total, version, lambda: bytes(response.read1(BLOCK_BYTES)))


def _extent(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return the place of the first byte that comes, and the bytes of the whole file."""
    if response.status == 206:
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise RestartError("the server answers with another range than it was asked for")
        return start, None if match[2] == "*" else int(match[2])
    if response.status != 200:
        raise RefusedError(f"the server answers {response.status} {response.reason}")
    return 0, response.length


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens http and https only, so that no answer can lead to a local file."""
    opener = urllib.request.OpenerDirector()
    for part in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(part)
    return opener


@contextmanager
def _ask_fsspec(url: str, start: int, _timeout_s: float) -> Iterator[Answer]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    about = system.info(path)
    size = about.get("size")
    version = _version(about, VERSION_KEYS)
    with system.open(path, "rb") as file:
        if start:
            file.seek(start)
        total = size if isinstance(size, int) else None
        yield Answer(start, total, version, lambda: bytes(file.read(BLOCK_BYTES)))


def _version(about: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return what changes when a file is written anew, also with the bytes it had."""
    return " ".join(str(about[key]) for key in keys if about.get(key)) or None


def _kind(error: Exception) -> type[TransientError] | type[RefusedError]:
    """Say whether an error of a library is one that passes."""
    cause: Any = (
        getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error
    )
    match cause:
        case ssl.SSLCertVerificationError() | FileNotFoundError() | PermissionError():
            return RefusedError
        case socket.gaierror() if cause.errno != socket.EAI_AGAIN:
            return RefusedError
        case OSError() | http.client.HTTPException() | TimeoutError() | EOFError():
            return TransientError
        case _:
            return _kind_by_status(cause)


def _kind_by_status(error: Any) -> type[TransientError] | type[RefusedError]:
    """Judge an error that fsspec's backends bring from their own http libraries."""
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int):
        passing = status in PASSING_STATUS or status >= 500
        return TransientError if passing else RefusedError
    local = ImportError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError
    return RefusedError if isinstance(error, local) else TransientError
