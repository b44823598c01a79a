"""`curation.json` beside a dataset: what was dropped and masked, and what the tokens cover."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.curate.tally import Tally
from mpt.errors import DataError
from mpt.recipe.curate import Curate
from mpt.storage import read_json, without_secrets

CURATION_NAME = "curation.json"
LIMIT_BYTES = 1 << 24
VERSION = 1
"""Of what the rules compute: another one makes other datasets of the same settings."""
RARE = 10


def settings_of(settings: Curate) -> dict[str, Any]:
    """Return what a dataset says of its rules: all that its bytes hang on, as JSON has it."""
    plain = asdict(settings)
    del plain["limit_bytes"]
    if wanted := plain["decontaminate"]:
        wanted["against"] = [without_secrets(location) for location in wanted["against"]]
    read_back: dict[str, Any] = json.loads(json.dumps(plain))
    return {"version": VERSION, "settings": read_back}


def counts_of(tally: Tally) -> dict[str, Any]:
    """Return what a dataset's description says of the documents, beside the settings."""
    return {"came": tally.came, "kept": tally.kept, "dropped": tally.dropped, "edits": tally.edits}


def account(
    curation: dict[str, Any], tally: Tally, id_counts: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Return the content of curation.json.

    Args:
        curation: from `settings_of`.
        id_counts: (vocabulary,), how often each id is in the samples; null without a tokenizer.
    """
    vocabulary = None
    if id_counts is not None:
        vocabulary = {
            "ids": len(id_counts),
            "seen": int(np.count_nonzero(id_counts)),
            f"seen_{RARE}_times": int(np.count_nonzero(id_counts >= RARE)),
        }
    return {**curation, "tally": tally.as_json(), "vocabulary": vocabulary}


def read_account(directory: Path) -> dict[str, Any]:
    """Return curation.json of a prepared dataset, checked as far as a report needs it.

    Raises:
        DataError: there is none, or it is none that mpt wrote.
    """
    path = directory / CURATION_NAME
    if not path.exists():
        raise DataError(
            f"{directory}: has no {CURATION_NAME}: it was prepared without `prepare.curate`. Give "
            "the recipe or the source instead: they are read, and nothing is written but the "
            "report."
        )
    found = read_json(path, limit_bytes=LIMIT_BYTES)
    if not _is_account(found):
        raise DataError(f"{path}: not what `mpt data prepare` writes.")
    return dict(found)


def _is_account(found: Any) -> bool:
    """Say whether every value is what a page may be made of: the file may be a stranger's."""
    if not isinstance(found, dict) or set(found) != {"version", "settings", "tally", "vocabulary"}:
        return False
    tally, vocabulary = found["tally"], found["vocabulary"]
    empty = Tally().as_json()
    if not isinstance(tally, dict) or tally.keys() != empty.keys():
        return False
    lists = {key: len(value) for key, value in empty.items() if isinstance(value, list)}
    tables = {"dropped": 2, "broken": 2, "edits": 2, "sources": 5}
    return (
        all(_are_counts(tally[key], length) for key, length in lists.items())
        and all(
            isinstance(tally[key], dict)
            and all(_are_counts(counts, length) for counts in tally[key].values())
            for key, length in tables.items()
        )
        and _are_examples(tally["examples"])
        and (
            vocabulary is None
            or (
                (isinstance(vocabulary, dict) and {"ids", "seen"} <= vocabulary.keys())
                and _are_counts(list(vocabulary.values()), len(vocabulary))
            )
        )
    )


def _are_counts(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _are_examples(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(held, list)
        and all(
            isinstance(e, dict) and type(e.get("name")) is type(e.get("text")) is str for e in held
        )
        for held in found.values()
    )
