"""Laws of the rules: each has a text just inside and one just outside, whatever is beside them."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mpt.data.curate.judge import Judge
from mpt.data.curate.quality import MEASURED_CHARACTERS, Words, measure
from mpt.data.curate.rules import names_of
from mpt.errors import RecipeError
from mpt.recipe.curate import C4, EVERYTHING, Curate, Gopher, Length, Pii
from mpt.recipe.load import loads

NO_GOPHER: dict[str, None] = dict.fromkeys(entry.name for entry in fields(Gopher))
NO_C4 = C4(
    punctuated_lines=False,
    min_words_per_line=None,
    javascript_lines=False,
    policy_lines=False,
    citations=False,
    lorem_ipsum=False,
    curly_bracket=False,
    min_sentences=None,
)


def dropped_by(settings: Curate, *texts: str) -> list[set[str]]:
    """Which rules each text breaks, all of them judged as one batch."""
    judged = Judge(settings, None, 0.0).encode([text.encode() for text in texts], ["train"])
    names = names_of(settings)
    return [{n for bit, n in enumerate(names) if int(v) >> bit & 1} for v in judged.verdicts]


def words(count: int, first: int = 0) -> str:
    """So many words, no two alike."""
    return " ".join(f"w{number}" for number in range(first, first + count))


def share(n: int, of: int, one: str, other: str, by: str = " ") -> str:
    """A text of `of` parts, n of them `one`."""
    return by.join([one] * n + [other] * (of - n))


GOPHER_CASES = {
    "min_words": (50, words(50), words(49)),
    "max_words": (50, words(50), words(51)),
    "min_mean_word_length": (3.0, "aaa bbb", "aaa bb"),
    "max_mean_word_length": (3.0, "aaa bbb", "aaa bbbb"),
    "max_symbols_per_word": (0.1, words(9) + " a#", words(9) + " ##"),
    "max_bullet_lines": (0.9, share(9, 10, "- a", "a", "\n"), share(10, 10, "* a", "a", "\n")),
    "max_ellipsis_lines": (
        0.3,
        share(3, 10, "a...", "a", "\n"),
        share(4, 10, "a\u2026", "a", "\n"),
    ),
    "min_alphabetic_words": (0.8, share(2, 10, "7", "\u03b1"), share(3, 10, "7", "a")),
    "min_stop_words": (2, "the end of it", "the the the end"),
    "max_duplicate_lines": (0.3, "a\na\na\na\nb\nc\nd\ne\nf\ng", "a\na\na\na\na\nb\nc\nd\ne\nf"),
    "max_duplicate_paragraphs": (0.5, "a\n\na", "a\n\na\n\na"),
    "max_duplicate_line_characters": (0.2, "a\na\nbbb", "a\na\nbb"),
    "max_duplicate_paragraph_characters": (0.2, "a\n\na\n\nbbb", "a\n\na\n\nbb"),
    "max_top_2_gram": (0.2, "a b a b " + "c" * 16, "a b a b " + "c" * 15),
    "max_top_3_gram": (0.2, "a b x a b x " + "c" * 24, "a b x a b x " + "c" * 23),
    "max_top_4_gram": (0.2, "a b x y a b x y " + "c" * 32, "a b x y a b x y " + "c" * 31),
} | {
    f"max_duplicate_{n}_gram": (
        0.2,
        f"{words(n)} {words(n)} {'c' * (3 * len(words(n).replace(' ', '')))}",
        f"{words(n)} {words(n)} {'c' * (3 * len(words(n).replace(' ', '')) - 1)}",
    )
    for n in range(5, 11)
}


@pytest.mark.parametrize("key", GOPHER_CASES)
def test_each_rule_of_gopher_has_its_threshold_where_it_says(key: str) -> None:
    bound, inside, outside = GOPHER_CASES[key]
    settings = Curate(gopher=Gopher(**(NO_GOPHER | {key: bound})))  # type: ignore[arg-type]
    beside = "x y z " * 40
    found = dropped_by(settings, beside, inside, outside, beside)
    assert found[1:3] == [set(), {f"gopher.{key}"}]
    assert dropped_by(settings, inside) == [set()], "what is beside a text does not count"


def test_there_is_a_case_for_every_rule_of_gopher() -> None:
    assert GOPHER_CASES.keys() == NO_GOPHER.keys()


@pytest.mark.parametrize(
    ("key", "bound", "inside", "outside"),
    [
        ("min_characters", 3, "\u00e9\u00e9\u00e9", "\u00e9\u00e9"),
        ("max_characters", 3, "\u00e9\u00e9\u00e9", "aaaa"),
        ("min_words", 2, "a\nb", "ab"),
        ("max_words", 2, "a b", "a b c"),
    ],
)
def test_lengths_are_bounded(key: str, bound: int, inside: str, outside: str) -> None:
    settings = Curate(length=Length(**{key: bound}))
    assert dropped_by(settings, inside, outside) == [set(), {f"length.{key}"}]


def c4(**rules: object) -> Curate:
    return Curate(c4=C4(**(vars(NO_C4) | rules)))


@pytest.mark.parametrize(
    ("rules", "text", "kept"),
    [
        (
            {"punctuated_lines": True},
            'A b.\nno\n"Yes!"\nwell...\n\u201cEnd\u201d',
            'A b.\n"Yes!"\n\u201cEnd\u201d',
        ),
        ({"min_words_per_line": 3}, "a b c\na b\na b c d", "a b c\na b c d"),
        ({"javascript_lines": True}, "Turn on JavaScript.\nFine.", "Fine."),
        ({"policy_lines": True}, "Our Privacy Policy.\nFine.", "Fine."),
        ({"citations": True}, "So it is[12], they say[citation needed].", "So it is, they say."),
    ],
)
def test_c4_removes_lines_and_marks(rules: dict[str, object], text: str, kept: str) -> None:
    assert Judge(c4(**rules), None, 0.0).kept([text.encode()], "train") == [kept]


@pytest.mark.parametrize(
    ("rule", "bound", "inside", "outside"),
    [
        ("lorem_ipsum", True, "Lorem, ipsum", "a LOREM ipsum"),
        ("curly_bracket", True, "a }", "a {"),
        ("min_sentences", 3, "A. B? C!", "A. B? C"),
    ],
)
def test_c4_drops_documents(rule: str, bound: object, inside: str, outside: str) -> None:
    assert dropped_by(c4(**{rule: bound}), inside, outside) == [set(), {f"c4.{rule}"}]


def test_a_document_of_which_nothing_is_left_is_dropped_as_empty() -> None:
    assert dropped_by(c4(punctuated_lines=True), "no end") == [{"empty"}]


def test_what_is_personal_drops_a_document_where_that_is_chosen() -> None:
    settings = Curate(pii=Pii(email="drop", ip="mask"))
    assert dropped_by(settings, "8.8.8.8", "a@b.org") == [set(), {"pii.email"}]


def plain_grams(text: str) -> dict[str, float]:
    """The rules on sequences of words, word for word as their definition has them."""
    found = text.split()
    characters = max(sum(map(len, found)), 1)
    result = {}
    for n in range(2, 11):
        grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
        counts = Counter(grams)
        if n <= 4:
            many = {g: c for g, c in counts.items() if c > 1}
            best = max(
                many, key=lambda g: (many[g], sum(map(len, g)), -grams.index(g)), default=None
            )
            begins = [i for i, g in enumerate(grams) if g == best]
        else:
            begins = [i for i, g in enumerate(grams) if grams.index(g) < i]
        covered = {i + step for i in begins for step in range(n)}
        name = f"{'top' if n <= 4 else 'duplicate'}_{n}_gram"
        result[name] = sum(len(found[i]) for i in covered) / characters
    return result


def test_repetition_is_what_its_definition_says_for_many_texts_at_once() -> None:
    draw = random.Random(3)
    texts = [
        " ".join(draw.choices(["a", "bb", "ccc", "d"], k=draw.randint(0, 60))) for _ in range(60)
    ]
    columns = measure(texts, Words())
    for number, text in enumerate(texts):
        for name, value in plain_grams(text).items():
            assert columns[name][number] == pytest.approx(value), (name, text)


def test_verdicts_do_not_hang_on_what_was_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    texts = [" ".join(draw.choices("abcdefg", k=200)).encode() for _ in range(20)]
    fresh = [Judge(EVERYTHING, None, 0.0).encode([text], ["train"]) for text in texts]
    monkeypatch.setattr("mpt.data.curate.quality.REMEMBERED", 3)
    monkeypatch.setattr("mpt.data.curate.terms.REMEMBERED", 3)
    judge = Judge(EVERYTHING, None, 0.0)
    for again in (judge.encode([text], ["train"]) for text in texts):
        alone = fresh.pop(0)
        assert again.verdicts.tolist() == alone.verdicts.tolist()
        assert again.bands.tolist() == alone.bands.tolist()


LONG = 300_000
HOSTILE = {
    "one word": "a" * LONG,
    "newlines": "\n" * LONG,
    "null bytes": "\0" * LONG,
    "at signs": "@" * LONG,
    "names without a domain": "a@" * (LONG // 2),
    "domains without an end": "x@" + "a." * (LONG // 2),
    "labels": "@" + "a-" * (LONG // 2),
    "many domains": "a@b.c1 " * (LONG // 7),
    "digits": "1" * LONG,
    "octets": "1." * (LONG // 2),
    "colons": "2001:" * (LONG // 5),
    "keys that do not end": "-----BEGIN PRIVATE KEY-----" * (LONG // 27),
    "names of keys": "-----BEGIN " + "A " * (LONG // 2),
    "tokens": "eyJ" * (LONG // 3),
    "aws": "aws_secret_key = " * (LONG // 17),
    "prefixes": "AKIA ghp_ sk- xoxb- " * (LONG // 20),
    "ends of sentences": ".\"'" * (LONG // 3),
    "combining marks": "a" + "\u0301\u0323" * (LONG // 4),
    "kana": "\u3042" * (LONG // 3),
    "brackets": "[1" * (LONG // 2),
}


def test_no_hostile_text_takes_more_than_linear_time() -> None:
    """Each against a plain text as long, in the same process, with room for a busy machine."""
    masks = Pii(email="mask", ip="mask", secrets="mask")
    everything = replace(EVERYTHING, pii=masks), Curate(c4=C4())  # the latter removes most of it
    plain = words(LONG // 7)

    def seconds(text: str) -> float:
        judges = [Judge(settings, None, 0.0) for settings in everything]
        before = time.process_time()
        for judge in judges:
            judge.encode([text.encode()], ["train"])
        return time.process_time() - before

    usual = min(seconds(plain) for _ in range(2))
    for name, text in HOSTILE.items():
        assert seconds(text) < 10 * usual, name


def test_of_a_long_text_the_length_is_that_of_all_of_it() -> None:
    text = "ab " * MEASURED_CHARACTERS
    assert measure([text], Words())["words"] == [MEASURED_CHARACTERS]


def test_the_recipe_of_the_readme_is_one() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in readme.split("```yaml\n")[1:] if "  curate:" in b.partition("```")[0]]
    tiny = (Path(__file__).parents[2] / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    before, _, rest = tiny.partition("prepare:")
    after = rest[rest.index("\ntrain:") :]
    recipe = loads(before + block.partition("```")[0] + after, "README.md")
    assert recipe.prepare is not None
    assert recipe.prepare.curate is not None
    assert recipe.prepare.curate.gopher == Gopher(max_symbols_per_word=None)


@pytest.mark.parametrize(
    ("curate", "message"),
    [
        ("{near_duplicates: {threshold: 0.2}}", "threshold: 0.2 is not in"),
        ("{gopher: {min_words: 10, max_words: 5}}", "min_words: 10 is above max_words 5"),
        ("{length: {min_characters: -1}}", "min_characters: -1 is no bound"),
        ("{decontaminate: {}}", "decontaminate: names nothing"),
        ("{decontaminate: {against: [x], ngram_words: 0}}", "ngram_words: 0 is not in"),
        ("{decontaminate: {eval_split: true}}", "there is no data.eval to keep apart"),
        ("{pii: {email: hide}}", "'hide' is not one of 'off', 'mask', 'drop'"),
        ("{limit_bytes: 5}", "limit_bytes: 5 is less than"),
        ("{gohper: {}}", "did you mean `gopher`"),
    ],
)
def test_rules_that_cannot_be_are_refused_by_name(curate: str, message: str) -> None:
    tiny = (Path(__file__).parents[2] / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    if "eval_split" in curate:
        tiny = tiny.replace("\n  eval: {path", "\n  # {path")
    text = tiny.replace("  eval_fraction: 0.02", f"  curate: {curate}\n  eval_fraction: 0.02")
    with pytest.raises(RecipeError, match=re.escape(message)):
        loads(text, "tiny.yaml")
