"""Laws of finding documents again: by their text, by their likeness, by a sequence of words."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from mpt.data.batches import Batch
from mpt.data.curate.duplicates import MOST_ALIKE, ExactTable, NearTable, Table
from mpt.data.curate.heldout import HeldOut, hold
from mpt.data.curate.judge import Judge
from mpt.data.curate.settle import Settler
from mpt.data.curate.sketch import N_HASHES, agreeing_bytes, band_shape, sketch
from mpt.data.curate.terms import SLICE_CHARACTERS, Reader
from mpt.errors import DataError
from mpt.recipe.curate import Curate, NearDuplicates

LIMIT = 1 << 24


def words(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def shingles(text: str, length: int = 5) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[i : i + length]) for i in range(max(1, len(found) - length + 1))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def pairs(count: int) -> Iterator[tuple[str, str]]:
    """Pairs of texts of every likeness: the second is the first with a part made anew."""
    draw = random.Random(11)
    for number in range(count):
        text = words(draw, draw.randint(120, 300))
        changed = int(len(text) * number / count * 0.5)
        yield " ".join(text), " ".join(words(draw, changed) + text[changed:])


def kept(settings: Curate, texts: list[str]) -> list[bool]:
    payloads = [text.encode() for text in texts]
    batch = Batch(0, payloads, ["x"] * len(texts), 0)
    judged = Judge(settings, None, 0.0).encode(payloads, ["train"])
    settler = Settler(settings)
    return (settler._with_duplicates(judged) == 0).tolist() if batch.texts else []


def test_a_table_is_a_dictionary_of_lists_at_any_size() -> None:
    draw = random.Random(2)
    table = Table(LIMIT, "test", numbered=True)
    # The top half of a key is its home: many meet, at the very end of the table too.
    homes = [0, 1, 2**31, 2**32 - 1]
    reference: dict[int, list[int]] = {}
    for number in range(9000):
        home = draw.choice(homes) if number % 3 else draw.getrandbits(32)
        key = (home << 32 | draw.randrange(1, 200)) if number % 3 else home << 32 | 5
        if len(reference.setdefault(key, [])) < MOST_ALIKE:
            reference[key].append(number)
        table.add(key, number)
    for key, numbers in reference.items():
        assert list(table.find(key)) == numbers
    assert not any(list(table.find(draw.getrandbits(64))) for _ in range(1000))


def test_tables_take_the_memory_that_is_stated_and_then_refuse() -> None:
    draw = np.random.default_rng(1)
    keys = draw.integers(1, 2**64, 200_000, np.uint64).tolist()
    exact = Table(LIMIT, "test", numbered=False)
    for number, key in enumerate(keys, 1):
        exact.add(key)
        if number > 10_000:
            assert exact.nbytes <= 17 * number
    n_bands, _ = band_shape(0.8)
    near, small, row = NearTable(0.8, LIMIT // 4), ExactTable(1 << 20), np.zeros(N_HASHES, np.uint8)
    rows = (keys[start : start + n_bands] for start in range(0, len(keys), n_bands))
    with pytest.raises(DataError, match=r"near duplicates would take \d+ bytes.*limit_bytes"):
        deque(map(near.add, rows, repeat(row)), maxlen=0)
    held = (len(keys) - n_bands * len(list(rows))) / n_bands
    assert LIMIT / 4 / 450 < held < LIMIT / 4 / 200
    with pytest.raises(DataError, match="exact duplicates would take"):
        deque(map(small.add, keys), maxlen=0)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_bring_together_what_is_as_alike_as_the_threshold(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert bands * rows <= N_HASHES
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_near_duplicates_are_found_as_brute_force_finds_them(threshold: float) -> None:
    settings = Curate(near_duplicates=NearDuplicates(threshold=threshold))
    texts = list(pairs(400))
    found = [not second for _, second in (kept(settings, list(pair)) for pair in texts)]
    alike = [jaccard(*pair) for pair in texts]
    clear = [hit for hit, value in zip(found, alike, strict=True) if value >= threshold + 0.1]
    far = [hit for hit, value in zip(found, alike, strict=True) if value <= threshold - 0.1]
    assert len(clear) > (20 if threshold == 0.9 else 40) or threshold == 0.9
    assert len(far) > 40
    assert sum(clear) >= 0.99 * len(clear), "recall"
    assert sum(far) <= 0.01 * len(far), "precision"
    assert agreeing_bytes(1.0) == N_HASHES


def test_the_first_of_duplicates_is_kept_and_only_it() -> None:
    draw = random.Random(4)
    text = words(draw, 100)
    near = [*text[:-1], "other"]
    texts = [" ".join(words(draw, 100)), " ".join(text), " ".join(text), " ".join(near)]
    exact = Curate(exact_duplicates=True)
    both = Curate(exact_duplicates=True, near_duplicates=NearDuplicates())
    assert kept(exact, texts) == [True, True, False, True]
    assert kept(both, texts) == [True, True, False, False]
    assert kept(both, ["!", "?", "!", ""]) == [True, True, False, False], "nothing to compare"


def test_case_punctuation_and_forms_do_not_hide_a_near_duplicate() -> None:
    text = "The \ufb01rst caf\u00e9, \u201cas they say\u201d, is here; " * 3
    other = 'the FIRST cafe\u0301 "as they say" is here... ' * 3
    assert kept(Curate(near_duplicates=NearDuplicates()), [text, other]) == [True, False]


def test_a_sketch_does_not_hang_on_what_is_beside_a_text() -> None:
    texts = [text for pair in pairs(10) for text in pair] + ["", "one", "one two"]
    together = sketch(Reader().read(texts), 5, 0.8)
    for number, text in enumerate(texts):
        alone = sketch(Reader().read([text]), 5, 0.8)
        assert together.found[number] == alone.found[0] == bool(text)
        assert together.bands[number].tolist() == alone.bands[0].tolist()
        assert together.bytes[number].tolist() == alone.bytes[0].tolist()


def test_sketches_are_the_same_in_every_version() -> None:
    """The bytes of datasets hang on them: what changes these makes `account.VERSION` another."""
    found = sketch(Reader().read(["the quick brown fox jumps over the lazy dog"]), 5, 0.8)
    assert found.bands[0, :2].tolist() == BANDS
    assert found.bytes[0, :6].tolist() == BYTES


BANDS = [17165156552061300239, 3668511127081447352]
BYTES = [222, 174, 247, 38, 45, 47]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[HeldOut]:
    found = hold(iter([TEST, "Short one!"]), 13, LIMIT, tmp_path)
    yield found
    found.close()
    assert not list(tmp_path.iterdir())


TEST = " ".join(f"t{number}" for number in range(30))


def shares(table: HeldOut, *texts: str) -> list[bool]:
    reader = Reader()
    heads = reader.read([text[:SLICE_CHARACTERS] for text in texts])
    found: list[bool] = table.shared_by(texts, heads, reader).tolist()
    return found


def test_a_planted_sequence_is_found_and_only_that(table: HeldOut) -> None:
    planted, shorter = " ".join(TEST.split()[9:22]), " ".join(TEST.split()[9:21])
    texts = [
        f"before it {planted} after it",
        f"before it {shorter} after it",
        f"Before it: {planted.upper().replace(' ', ', ')}!",
        "nothing",
        "",
        "short, one",
        "not the short one",
    ]
    assert shares(table, *texts) == [True, False, True, False, False, True, False]
    parts = [*planted.split()[:6], *planted.split()[6:]]
    assert not any(shares(table, " ".join(parts[:6]), " ".join(parts[6:]))), "across documents"


def test_a_sequence_is_found_wherever_a_long_text_is_cut(
    table: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.curate.terms.SLICE_CHARACTERS", 40)
    monkeypatch.setattr("mpt.data.curate.heldout.SLICE_CHARACTERS", 40)
    planted = " ".join(TEST.split()[3:16])
    for before in range(60, 110, 3):
        text = f"{'x ' * before}{planted} y{' z' * 20}"
        reader = Reader()
        assert table.shared_by([text], reader.read([text[:40]]), reader).tolist() == [True]


def test_test_texts_that_take_too_much_memory_are_refused(tmp_path: Path) -> None:
    texts = (" ".join(f"t{i}-{j}" for j in range(20_000)) for i in range(100))
    with pytest.raises(DataError, match="test texts to decontaminate against would take"):
        hold(texts, 13, 1 << 20, tmp_path)
    assert not list(tmp_path.iterdir())
