"""`mpt generate` in this process: texts on stdout, remarks on stderr, mistakes named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mpt.errors import EXIT_DATA, EXIT_DONE, EXIT_USAGE, DataError
from mpt.generate.prompts import read_prompts
from mpt.hf.config import config_json
from mpt.tokenizer import train_tokenizer
from tests.cli.test_cli import mpt
from tests.generate.networks import CONTEXT, small

N_IDS = 290


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as an export writes it."""
    directory = tmp_path_factory.mktemp("model")
    network = small(vocab_size=N_IDS, tie_word_embeddings=True)
    # A tied head likes to repeat; and a single byte is seldom a character.
    network.transformer.wte.weight.data[:258] *= 0.1
    cfg = network.transformer.cfg
    (directory / "config.json").write_text(json.dumps(config_json(cfg, dtype="fp32", eod_id=0)))
    save_file(network.state_dict(), directory / "model.safetensors")
    text = "some text, and more of the same text\n" * 9
    train_tokenizer([text], directory / "tokenizer.model", vocab_size=N_IDS)
    return directory


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_single_prompt_is_followed_by_its_text(model: Path) -> None:
    code, out, err = mpt("generate", model, "some ", "--tokens", "9", "--seed", "3")
    assert (code, err) == (EXIT_DONE, "")
    assert out.startswith("some ")
    (record,) = records(mpt("generate", model, "some ", "--tokens=9", "--seed=3", "--json")[1])
    assert out == "some " + record["text"] + "\n"
    assert record["prompt"] == "some "
    assert (record["n_tokens"], record["finish"]) == (9, "length")


def test_prompts_of_a_file_come_in_order_and_each_as_it_does_alone(
    model: Path, tmp_path: Path
) -> None:
    prompts = ["some text", "m", "and more of the same", "text"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n\n")
    asked = ("--tokens", "8", "--samples", "2", "--batch", "3", "--stop", "e")
    code, out, err = mpt("generate", model, "--prompts", file, "--json", *asked)
    assert (code, err) == (EXIT_DONE, "")
    found = records(out)
    assert [(r["prompt"], r["sample"]) for r in found] == [(p, n) for p in prompts for n in (0, 1)]
    for number, prompt in enumerate(prompts):
        alone = records(mpt("generate", model, prompt, "--json", *asked)[1])
        assert alone == found[2 * number : 2 * number + 2]
    assert {record["finish"] for record in found} >= {"stop"}
    shown = mpt("generate", model, "--prompts", file, *asked)[1]
    assert shown == "".join(
        f"=== prompt {n // 2 + 1}, sample {n % 2 + 1}\n{r['prompt']}{r['text']}\n"
        for n, r in enumerate(found)
    )


def test_options_reach_the_model(model: Path) -> None:
    def text(*asked: str) -> str:
        out: str = mpt("generate", model, "some text", "--tokens", "12", *asked)[1]
        return out

    plain = text()
    for asked in (
        "--seed=1",
        "--temperature=5",
        "--top-k=1",
        "--top-p=0.1",
        "--min-p=0.9",
        "--repetition-penalty=9",
        "--context=2",
        "--tokens=5",
    ):
        assert text(asked) != plain, asked
    assert text("--device=cpu", "--dtype=fp32") == plain
    assert text("--top-k=1") == text("--temperature=0")
    assert text("--dtype=bf16", "--top-k=1").startswith("some text")


def test_what_is_beyond_the_context_is_said_on_stderr(model: Path) -> None:
    code, out, err = mpt("generate", model, "some", "--tokens", "30", "--temperature", "2")
    assert code == EXIT_DONE
    assert "oldest half is forgotten" in err
    longer = mpt("generate", model, "some", "--context", "99", "--tokens", "30", "--temperature=2")
    assert f"beyond the {CONTEXT} that the model was trained on" in longer[2]
    assert longer[1] != out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give either a PROMPT or --prompts"),
        (("x", "--prompts", "y"), "give either a PROMPT or --prompts"),
        (("x", "--top-p", "7", "--tokens", "0"), "--tokens 0 is not a positive count; --top-p 7.0"),
        (("x", "--context", "-3"), "--context -3"),
    ],
)
def test_mistakes_are_named(model: Path, args: tuple[str, ...], said: str) -> None:
    code, out, err = mpt("generate", model, *args)
    assert (code, out) == (EXIT_USAGE, "")
    assert said in err


def prompts_of(tmp_path: Path, content: str | bytes, name: str = "file") -> list[str]:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(file)


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, "a\r\n\n  b\u2028c \n") == ["a", "  b\u2028c "]
    assert prompts_of(tmp_path, '{"prompt": "a\\nb"}\n{"prompt": "", "id": 7}') == ["a\nb", ""]
    assert prompts_of(tmp_path, 'x\n{"prompt": "a"}\n[1]') == ["x", '{"prompt": "a"}', "[1]"]
    assert prompts_of(tmp_path, "{\n}\n") == ["{", "}"]


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"prompt": "a"}\n\nb', "file", "file:3: is not an object such as"),
        ("a", "file.jsonl", "file.jsonl:1: is not"),
        ('{"prompt": 5}', "file.jsonl", "file.jsonl:1: is not"),
        ('{"prompt": "a"}\n' + "[" * 9999, "file", "file:2: is not"),
        (" \n\n", "file", "holds no prompt"),
        (b"a\xff", "file", "is not UTF-8 text, at byte 1"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, content: str | bytes, name: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        prompts_of(tmp_path, content, name)
    with pytest.raises(DataError, match="no prompts can be read here: No such file"):
        read_prompts(tmp_path / "missing")


def test_prompts_come_from_standard_input(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\nsome\n".encode())))
    code, out, _ = mpt("generate", model, "--prompts", "-", "--tokens", "3", "--json")
    assert code == EXIT_DONE
    assert [record["prompt"] for record in records(out)] == ["é", "some"]


def test_a_prompt_that_is_no_text_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "\\ud800"}')
    assert mpt("generate", model, "--prompts", file)[0] == EXIT_DATA
