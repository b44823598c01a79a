"""Which version of a growing source a preparation reads, kept over kills until it is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from mpt.data.plan import Plan, Progress
from mpt.data.source import Source, delta, find_source
from mpt.data.write import partial_of
from mpt.errors import DataError
from mpt.storage import atomic_write, read_json

LIMIT_BYTES = 1 << 16


@contextmanager
def pinned(plan: Plan) -> Iterator[Plan]:
    """Give the plan with what it reads, at one version until all is made of it.

    The version of a table that the recipe leaves open is the newest when the work begins; it is
    written beside the dataset, where a call that goes on after a kill or a failure finds it.

    Raises:
        DataError: no such source or version, or one that cannot be read any more.
    """
    try:
        yield _pinned(plan)
    finally:
        if not any(partial_of(path).exists() for path in plan.paths.values()):
            unpin(plan)  # all is made, or nothing is kept


def unpin(plan: Plan) -> None:
    """Forget the version."""
    if (path := _path(plan)).exists():
        path.unlink(missing_ok=True)


def _pinned(plan: Plan) -> Plan:
    source = find_source(plan.source.source, plan.source.text_key, plan.source.delta, plan.cache)
    if source.kind != "delta" or source.selection.version is not None:
        return replace(plan, reads=source)
    asked = {"source": plan.name, **asdict(source.selection)}
    path = _path(plan)
    if path.is_file():
        kept = read_json(path, limit_bytes=LIMIT_BYTES)
        if isinstance(kept, dict) and kept.get("asked") == asked and type(kept["version"]) is int:
            return replace(plan, reads=_at(source, kept["version"], path, plan))
    selection = delta.pinned(source.location, source.selection)
    atomic_write(path, json.dumps({"asked": asked, "version": selection.version}) + "\n")
    return replace(plan, reads=replace(source, selection=selection))


def _at(source: Source, version: int, path: Path, plan: Plan) -> Source:
    """Return the source at a version that was read before."""
    selection = replace(source.selection, version=version, timestamp=None)
    try:
        delta.check(source.location, selection)
        if source.selection.timestamp is None and delta.newest_version(source.location) != version:
            plan.watch(Progress("version"))
    except DataError as error:
        raise DataError(
            f"{error} It was being read at version {version} when a call was cut short; delete "
            f"{path} to begin again with the version that is there now."
        ) from error
    return replace(source, selection=selection)


def _path(plan: Plan) -> Path:
    place = plan.paths["train"].resolve()
    return place.with_name(f"{place.name}.source.json")
