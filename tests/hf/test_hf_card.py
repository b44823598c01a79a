"""Laws of the model card: it says what the run says, and no stranger's text gets out of its box."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpt import recipe
from mpt.checkpoint.layout import MANIFEST, Manifest
from mpt.errors import CheckpointError
from mpt.hf.card import CARD_MARK, Provenance, _code, _fenced, is_card, model_card, provenance_of
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.state import RunState, Vitals

MODEL = Model(d_model=48, n_heads=6, n_layers=2, max_seq_len=96, vocab_size=1100, kv_n_heads=2)
EMPTY = Provenance(datasets={}, versions={})
RECIPE = Path(__file__).parents[1] / "golden/recipe.yaml"


def card(about: Provenance = EMPTY, model: Model = MODEL, format: str = "mpt") -> str:
    return model_card(model, about, format=format, dtype="bf16", proof="Logits are equal.")


@pytest.fixture
def cfg() -> Recipe:
    return recipe.load(RECIPE)


@pytest.fixture
def checkpoint(tmp_path: Path, cfg: Recipe) -> Path:
    """A checkpoint of step 40 within a run that went on."""
    directory = tmp_path / "runs/secret-host/checkpoints/step-00000040"
    directory.mkdir(parents=True)
    losses = tuple((step, 10.0 - step / 8) for step in range(1, 41))
    state = RunState(step=40, samples=320, tokens=30_720, vitals=Vitals(losses))
    manifest = Manifest(state, 2, asdict(MODEL), "ab" * 32, {"torch": "2.13.0"}, ())
    (directory / MANIFEST).write_text(manifest.to_json())
    run_dir = directory.parent.parent
    recipe.freeze(cfg, run_dir / "recipe.yaml")
    provenance = {
        "recipe_sha256": "cd" * 32,
        "datasets": {"tokenizer": "12" * 32, "stdlib": "34" * 32},
        "host": "secret-host",
        "platform": "Linux-secret",
        "created": "2026-11-01T00:00:00.000Z",
    }
    (run_dir / "provenance.json").write_text(json.dumps(provenance))
    lines = [
        {"step": 20, "eval_loss": 9.0, "eval_bits_per_byte": 3.0},
        {"step": 40, "eval_loss": 8.0, "eval_bits_per_byte": 2.5},
        {"step": 40, "loss": 5.0},
        {"step": 40, "eval_loss": 6.0, "eval_bits_per_byte": 2.0},
        {"step": 30, "eval_loss": 8.5},
        {"step": 60, "eval_loss": 1.0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_checkpoint_knows_what_it_comes_from(checkpoint: Path, cfg: Recipe) -> None:
    about = provenance_of(checkpoint)
    assert (about.step, about.tokens, about.run) == (40, 30_720, cfg.run)
    assert about.train_loss_steps == 20
    assert about.train_loss == pytest.approx(sum(10.0 - s / 8 for s in range(21, 41)) / 20)
    # of a step taken twice the later time counts, and nothing of later steps
    assert (about.eval_step, about.eval_loss, about.eval_bits_per_byte) == (40, 6.0, 2.0)
    assert about.recipe_sha256 == "ab" * 32  # the manifest's: a run may have changed since
    assert about.datasets == {"tokenizer": "12" * 32, "stdlib": "34" * 32}
    assert about.created == "2026-11-01T00:00:00.000Z"


def test_the_card_says_it_all_and_names_no_machine(checkpoint: Path) -> None:
    text = card(provenance_of(checkpoint))
    for said in (
        "40 optimizer steps, 30,720 tokens",
        "training loss 6.1875",
        "held-out loss 6.0000 nats per token, 2.0000 bits per byte, at step 40",
        "ab" * 32,
        "34" * 32,
        "torch 2.13.0",
        "Logits are equal.",
        "kv_n_heads: 2",
        "global_batch_size",
        "stored as bf16",
    ):
        assert said in text
    assert "secret" not in text
    assert str(Path.cwd()) not in text
    assert "/home" not in text


def test_no_directory_no_user_and_no_password_of_a_recipe_is_told(
    checkpoint: Path, cfg: Recipe
) -> None:
    streams = {
        "a": replace(next(iter(cfg.data.streams.values())), path="s3://me:key@bucket/data?token=t"),
        "b": replace(next(iter(cfg.data.streams.values())), path="/home/me/private/words"),
    }
    changed = replace(cfg, prepare=None, data=replace(cfg.data, streams=streams))
    recipe.freeze(changed, checkpoint.parent.parent / "recipe.yaml")
    about = provenance_of(checkpoint)
    assert about.recipe is not None
    shown = yaml.safe_load(about.recipe)
    paths = {name: stream["path"] for name, stream in shown["data"]["streams"].items()}
    assert paths == {"a": "s3://bucket/data", "b": "words"}
    for hidden in ("me:key", "token=t", "private"):
        assert hidden not in card(about)


def test_a_checkpoint_by_itself_says_what_its_manifest_says(
    checkpoint: Path, tmp_path: Path
) -> None:
    alone = checkpoint.rename(tmp_path / "step-00000040")
    about = provenance_of(alone)
    assert (about.step, about.recipe, about.datasets, about.eval_loss) == (40, None, {}, None)
    assert "40 optimizer steps" in card(about)
    (alone / MANIFEST).unlink()
    with pytest.raises(CheckpointError):
        provenance_of(alone)


def test_what_is_damaged_in_a_run_is_left_out(checkpoint: Path) -> None:
    run_dir = checkpoint.parent.parent
    (run_dir / "recipe.yaml").write_text("model: [")
    (run_dir / "provenance.json").write_text("{")
    (run_dir / "metrics.jsonl").write_text('{"step": 40, "eval_l\n[]\n{"step": "x"}\n')
    about = provenance_of(checkpoint)
    assert (about.recipe, about.run, about.datasets, about.eval_step) == (None, None, {}, None)
    assert card(about)


def test_an_imported_checkpoint_says_from_where(tmp_path: Path) -> None:
    manifest = Manifest(RunState(), 1, asdict(MODEL), "", {}, ())
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert "the weights come from elsewhere" in card(provenance_of(tmp_path))
    (tmp_path / "source.json").write_text('{"imported_from": "/home/me/mpt-7b"}')
    text = card(provenance_of(tmp_path))
    assert "imported from `mpt-7b`" in text
    assert "/home" not in text


@pytest.mark.parametrize("format", ["mpt", "llama", "gguf"])
def test_the_head_is_what_the_hub_reads_and_leaves_the_license_open(format: str) -> None:
    _, head, rest = card(format=format).split("---\n", 2)
    front: dict[str, Any] = yaml.safe_load(head)
    assert front["pipeline_tag"] == "text-generation"
    assert "mpt" in front["tags"]
    assert ("gguf" in front["tags"]) == (format == "gguf")
    assert front.get("library_name") == (None if format == "gguf" else "transformers")
    assert "license" not in front
    assert rest.startswith(f"{CARD_MARK}\n")
    assert ("llama-cli" in rest) == (format == "gguf")


def test_a_card_knows_itself_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert not is_card(path)
    path.write_text(card())
    assert is_card(path)
    path.write_text(f"# Mine\n\nThe line `{CARD_MARK}` marks a card.\n")
    assert not is_card(path)
    path.write_bytes(b"\xff\xfe")
    assert not is_card(path)


HOSTILE = "`````\n</details><script>alert(1)</script>\n# Trained by somebody else\n```"


def test_no_text_of_a_recipe_or_a_manifest_leaves_its_box() -> None:
    about = Provenance(
        step=1,
        datasets={f"a`b\n{HOSTILE}": HOSTILE},
        versions={HOSTILE: "1"},
        run=HOSTILE,
        recipe=HOSTILE,
        recipe_sha256=HOSTILE,
        created=HOSTILE,
        imported_from=HOSTILE,
    )
    left = list(outside_of_fences(card(about)))
    assert not [line for line in left if "<script" in without_code(line)]
    title, *headings = (line for line in left if line.startswith("#"))
    assert not set("<>`[]") & set(title)
    assert headings == [
        "## Use",
        "## Model",
        "## Training",
        "## What was checked",
        "## License and intended use",
    ]
    assert sum(line == "</details>" for line in left) == 1


def outside_of_fences(text: str) -> list[str]:
    """The lines that a reader of Markdown does not take for code."""
    lines, fence = [], ""
    for line in text.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence:
            if ticks >= len(fence) and not line.strip("`"):
                fence = ""
        elif ticks >= 3:
            fence = "`" * ticks
        else:
            lines.append(line)
    return lines


def without_code(line: str) -> str:
    """The line without its spans of code: a run of backticks up to the next of equal length."""
    left = ""
    while "`" in line:
        before, _, line = line.partition("`")
        run = len(line) - len(line.lstrip("`")) + 1
        rest = line[run - 1 :]
        at = 0
        while True:
            at = rest.find("`", at)
            if at < 0:
                return left + before + rest
            size = len(rest[at:]) - len(rest[at:].lstrip("`"))
            if size == run:
                break
            at += size
        left, line = left + before, rest[at + run :]
    return left + line


@given(text=st.text(st.sampled_from("`a <\n\r\u2028~#\x1b\u202e")))
def test_code_stays_code_whatever_it_holds(text: str) -> None:
    span = _code(text)
    assert span.isprintable()
    if "".join(c for c in text if c.isprintable()).strip():
        assert without_code(span) == ""
    assert outside_of_fences(_fenced(text, "yaml")) == []
