"""Laws of the report: it shows what was counted, and nothing of a document can act or leak."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mpt.cli.main import main

from mpt.data.batches import split_of
from mpt.data.curate.account import read_account
from mpt.data.curate.assess import is_in_sample
from mpt.data.curate.page import page
from mpt.data.prepare import prepare
from mpt.data.source import Document
from mpt.errors import DataError
from mpt.recipe.curate import C4, Curate, Length, Pii
from mpt.recipe.frozen import freeze
from tests.data.cases import files_of, recipe_for, some_texts, write_texts, write_tokenizer

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\0&amp; jane@example.org"
)


class Checked(HTMLParser):
    """Reads a page, and refuses what could act or fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.policy: str | None = None
        self.feed(page)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "iframe", "link", "object", "form", "base", "a")
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on") or name in ("src", "href")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mpt", "data", "report", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [*some_texts(30), *(f"{HOSTILE} {{ {number}" for number in range(8))]
    folder = tmp_path / "texts"
    return write_texts(folder / "<b onclick=alert(3)>", texts).parent


RULES = Curate(
    exact_duplicates=True,
    c4=C4(punctuated_lines=False, min_words_per_line=None, min_sentences=None),
    length=Length(),
)


def test_nothing_of_a_document_acts_on_the_page_and_nothing_personal_is_shown(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    prepare(recipe_for(tmp_path / "out", corpus, curate=RULES), workers=1)
    assert run(monkeypatch, str(tmp_path / "out" / "train"), "--out", str(out)) == 0
    seen = Checked(out.read_text(encoding="utf-8"))
    shown = "".join(seen.text)
    assert seen.policy is not None
    assert seen.policy.startswith("default-src 'none'")
    assert "<script>alert(1)</script>" in shown, "as text"
    assert "<b onclick" in shown
    assert "me@" not in shown
    assert "[EMAIL]" in shown
    assert not set(shown) & set("\x1b\0")
    assert "c4.curly_bracket" in shown


def test_rules_are_tried_on_a_source_and_nothing_but_the_report_is_written(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files_of(tmp_path)
    assert run(monkeypatch, str(corpus), "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "all of them were tried" in said.err
    assert found["tally"]["came"][0] == 38
    assert found["tally"]["broken"]["pii.email"][0] == 8
    assert found["tally"]["broken"]["gopher.min_words"][0] > 0
    assert found["vocabulary"] is None
    assert files_of(tmp_path) == before


def test_a_recipe_says_what_its_rules_would_do_as_prepare_does_it(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rules = Curate(exact_duplicates=True, length=Length(min_characters=200), pii=Pii(email="mask"))
    recipe = recipe_for(tmp_path / "out", corpus, curate=rules)
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    freeze(recipe, tmp_path / "recipe.yaml")
    assert run(monkeypatch, str(tmp_path / "recipe.yaml"), "--json") == 0
    tried = json.loads(capsys.readouterr().out)
    assert sorted(files_of(tmp_path / "out")) == ["tokenizer.model"]
    prepare(recipe, workers=1)
    done = []
    for split in ("train", "eval"):
        assert run(monkeypatch, str(tmp_path / "out" / split), "--json") == 0
        done.append(json.loads(capsys.readouterr().out))
    for key in ("came", "kept"):
        both = [sum(counts) for counts in zip(*(each["tally"][key] for each in done), strict=True)]
        assert tried["tally"][key] == both
    assert tried["settings"] == done[0]["settings"]
    assert tried["vocabulary"]["seen"] >= done[0]["vocabulary"]["seen"]


def test_a_sample_is_drawn_by_content_and_apart_from_the_split() -> None:
    texts = [Document(str(n), f"text {n}") for n in range(4000)]
    chosen = [document for document in texts if is_in_sample(document, 0.1)]
    assert 300 < len(chosen) < 500
    assert chosen == [document for document in texts if is_in_sample(document, 0.1)]
    held = [document for document in chosen if split_of(document.text.encode(), 0.2) == "eval"]
    assert 0.1 < len(held) / len(chosen) < 0.3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{texts}", "--sample", "0"], 2, "not a share"),
        (["{texts}", "--sample", "200%"], 2, "not a share"),
        (["{texts}", "model.d_model=1"], 2, "not a recipe"),
        (["{tmp}/nowhere"], 3, "no such file"),
        (["{texts}", "--sample", "0.0000001%"], 3, "take a larger one"),
    ],
)
def test_what_cannot_be_reported_is_said(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    given = [each.format(texts=corpus, tmp=tmp_path) for each in arguments]
    assert run(monkeypatch, *given, "--out", str(tmp_path / "report.html")) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_is_no_report_is_not_written_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: mine\n")
    assert run(monkeypatch, str(corpus), "--out", str(recipe)) == 2
    assert run(monkeypatch, str(corpus), "--out", str(tmp_path)) == 2
    assert recipe.read_text() == "run: mine\n"
    for _ in range(2):  # a report gives way to a newer one
        assert run(monkeypatch, str(corpus), "--out", str(tmp_path / "report.html")) == 0


def test_no_value_of_an_account_can_be_of_another_kind(tmp_path: Path, corpus: Path) -> None:
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    prepare(recipe_for(tmp_path / "out", corpus, curate=RULES), workers=1)
    path = tmp_path / "out" / "train" / "curation.json"
    sound = path.read_text()
    page("x", read_account(path.parent), {}, would=False)
    for other in ('"<script>"', "-1", "1e999", "[]", "{}", "null", "true"):
        for found in re.finditer(r'[0-9]+(?=[,\n])|"text": "[^"]*"|\[\n|\{\n', sound[1:]):
            at, end = found.start() + 1, found.end() + 1
            if sound[at:end].startswith('"text"'):
                at += len('"text": ')
            path.write_text(sound[:at] + other + sound[end:])
            try:
                account = read_account(path.parent)
            except DataError:
                continue
            page("x", account, {}, would=False)  # of the settings: anything may stand there


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"tally": {"came": 3}}', "x"])
def test_an_account_that_is_none_is_an_error_that_names_it(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    prepare(recipe_for(tmp_path / "out", corpus), workers=1)
    dataset = tmp_path / "out" / "train"
    assert run(monkeypatch, str(dataset)) == 3
    assert "prepared without `prepare.curate`" in capsys.readouterr().err
    (dataset / "curation.json").write_text(content)
    assert run(monkeypatch, str(dataset)) == 3
    assert f"{dataset}/curation.json" in capsys.readouterr().err
