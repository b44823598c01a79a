"""Laws of the ledger: what it says is obeyed and kept, what is not one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.errors import UsageError
from mpt.ledger import LIMIT_BYTES, Entry, Ledger, RolledBack, Skipped, append_entry, read_ledger
from mpt.rundir import LEDGER

SAMPLES = 6
PATH = Path("runs/x/ledger.jsonl")


def written(*entries: Entry) -> bytes:
    return b"".join(json.dumps(entry.to_json()).encode() + b"\n" for entry in entries)


def read(text: bytes) -> Ledger:
    return Ledger.read(text, PATH, SAMPLES)


windows = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 6)).map(
        lambda w: RolledBack(0, SAMPLES * w[0], SAMPLES * (w[0] + w[1]), "bad")
    ),
    max_size=6,
)


@given(windows)
def test_a_position_moves_to_the_first_that_no_window_holds(entries: list[RolledBack]) -> None:
    ledger = Ledger(tuple(entries))
    inside = {p for e in entries for p in range(e.start, e.stop)}
    for position in range(240):
        wanted = next(p for p in range(position, 500) if p not in inside)
        assert ledger.position(position) == wanted
        assert ledger.went_back_from(position) == (position > 0 and position - 1 in inside)


def test_a_step_is_skipped_only_where_it_was() -> None:
    ledger = Ledger((Skipped(3, 12, 18, "nan"),))
    assert ledger.skips(3, 12)
    assert not ledger.skips(3, 18), "the same step on other data"
    assert not ledger.skips(4, 12), "the same data in another step"


def test_a_rollback_takes_the_skips_within_its_window_out_of_the_run() -> None:
    before, within, behind = (Skipped(n, SAMPLES * (n - 1), SAMPLES * n, "nan") for n in (2, 4, 6))
    ledger = Ledger((before, within, RolledBack(3, 18, 30, "bad"), behind))
    assert ledger.skips(2, 6)
    assert not ledger.skips(4, 18)
    assert ledger.skips(6, 30)
    assert ledger.n_rollbacks == 1


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    entries: tuple[Entry, ...] = (Skipped(3, 12, 18, 'loss "nan"\n'), RolledBack(2, 12, 30, "été"))
    assert read_ledger(tmp_path) == b""
    for n, entry in enumerate(entries, start=1):
        append_entry(tmp_path, entry)
        assert read(read_ledger(tmp_path)).entries == entries[:n]
    assert read_ledger(tmp_path) == written(*entries)


def test_a_line_that_a_crash_cut_off_counts_as_not_written(tmp_path: Path) -> None:
    whole, next_one = Skipped(3, 12, 18, "nan"), RolledBack(2, 12, 30, "bad")
    line = written(next_one)
    for length in range(len(line)):
        (tmp_path / LEDGER).write_bytes(written(whole) + line[:length])
        complete = length == len(line) - 1
        kept = (whole, next_one) if complete else (whole,)
        assert read(read_ledger(tmp_path)).entries == kept
        append_entry(tmp_path, whole)
        assert read(read_ledger(tmp_path)).entries == (*kept, whole)


def test_a_line_that_cannot_be_written_leaves_the_ledger_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_entry(tmp_path, Skipped(3, 12, 18, "nan"))
    before = read_ledger(tmp_path)
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        append_entry(tmp_path, Skipped(4, 18, 24, "nan"))
    assert read_ledger(tmp_path) == before


def no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


SKIPPED = Skipped(3, 12, 18, "nan").to_json()
ROLLED_BACK = RolledBack(2, 12, 30, "bad").to_json()


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k != key}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\xfd", "."),
        (b"[" * 100_000, "."),
        (b"1", "is not an object"),
        (b"{}", "kind is None"),
        (SKIPPED | {"kind": "forgiven"}, "kind is 'forgiven'; known are skipped and rolled_back"),
        (SKIPPED | {"kind": ["skipped"]}, "kind is"),
        (SKIPPED | {"more": 1}, "a skipped line has the keys from, kind, step, to, why"),
        (without(ROLLED_BACK, "why"), "a rolled_back line has the keys"),
        (SKIPPED | {"step": -1}, "step is -1, not a count"),
        (SKIPPED | {"step": True}, "step is True, not a count"),
        (SKIPPED | {"step": 3.0}, "step is 3.0, not a count"),
        (ROLLED_BACK | {"to_step": None}, "to_step is None, not a count"),
        (ROLLED_BACK | {"to": 6 * 10**30}, "to is 6000.*, not a count"),
        (SKIPPED | {"why": 7}, "why is not a text"),
        (SKIPPED | {"to": 24}, "from 12 to 24 is more than one step"),
        (SKIPPED | {"from": 13, "to": 19}, "from 13 to 19 is not a number of whole batches of 6"),
        (ROLLED_BACK | {"to": 12}, "from 12 to 12 is not a number of whole batches"),
        (ROLLED_BACK | {"from": 36}, "from 36 to 30 is not a number of whole batches"),
    ],
)
def test_what_is_not_a_ledger_is_refused_by_file_and_line(line: Any, words: str) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    sound = json.dumps(SKIPPED).encode()
    with pytest.raises(UsageError, match=rf"^runs/x/ledger\.jsonl:2: {words}") as raised:
        read(sound + b"\n" + raw + b"\n" + sound + b"\n")
    assert len(str(raised.value)) < 400


@given(st.binary(max_size=300))
def test_no_bytes_end_in_anything_but_a_ledger_or_a_sentence(text: bytes) -> None:
    try:
        read(text)
    except UsageError as error:
        said = str(error)
    else:
        return
    assert said.startswith("runs/x/ledger.jsonl:")


def test_a_file_that_cannot_be_a_ledger_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / LEDGER).open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(UsageError, match="larger than 67108864 bytes"):
        read_ledger(tmp_path)
    (tmp_path / LEDGER).unlink()
    (tmp_path / LEDGER).mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_ledger(tmp_path)
