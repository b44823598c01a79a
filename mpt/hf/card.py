"""The model card of an export: what the model is, what it was trained on, and what is proved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mpt import recipe
from mpt.checkpoint.layout import Manifest, read_manifest
from mpt.errors import DataError, RecipeError
from mpt.log import read_lines
from mpt.recipe.budget import n_parameters
from mpt.recipe.model import Model
from mpt.rundir import CHECKPOINTS, METRICS, PROVENANCE, RECIPE
from mpt.storage import is_url, read_json, without_secrets

CARD_FILE = "README.md"
CARD_MARK = "<!-- written by mpt export -->"
"""A line of every card, by which a later export knows that it may replace it."""
SOURCE_FILE = "source.json"
"""In an imported checkpoint: `{"imported_from": "..."}`."""

_LAST_STEPS = 20  # their mean is the final training loss: a single step's is mostly noise
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where weights come from. What is not known is None or empty, and the card says nothing."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens read by those steps."""
    train_loss: float | None = None
    """Nats per target token, mean of the last `train_loss_steps` steps."""
    train_loss_steps: int = 0
    eval_step: int | None = None
    """The last step up to this one at which held-out data was looked at."""
    eval_loss: float | None = None
    """Nats per target token then."""
    eval_bits_per_byte: float | None = None
    datasets: Mapping[str, str]
    """SHA-256 of each dataset's index and of the tokenizer, by name."""
    run: str | None = None
    """Name of the run."""
    recipe: str | None = None
    """The resolved recipe as YAML, without the machine's directories."""
    recipe_sha256: str | None = None
    versions: Mapping[str, str]
    """Of what made the numbers, by package."""
    created: str | None = None
    """When the run began, UTC."""
    imported_from: str | None = None


def provenance_of(checkpoint: Path) -> Provenance:
    """Return what a checkpoint directory, and the run that it lies in, say of their making.

    Raises:
        CheckpointError: if there is no sound manifest.
    """
    manifest = read_manifest(checkpoint)
    losses = [loss for _, loss in manifest.state.vitals.losses][-_LAST_STEPS:]
    known: dict[str, Any] = {
        "step": manifest.step,
        "tokens": manifest.state.tokens,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "train_loss_steps": len(losses),
        "datasets": {},
        "recipe_sha256": manifest.recipe_sha256 or None,
        "versions": _texts(manifest.versions),
        "imported_from": _text(
            _without_places(_json(checkpoint / SOURCE_FILE).get("imported_from"))
        ),
    }
    directory = checkpoint.resolve()
    if directory.parent.name == CHECKPOINTS:
        known |= _of_run(directory.parent.parent, manifest)
    return Provenance(**known)


def is_card(path: Path) -> bool:
    """Whether a file is a card of an earlier export, untouched enough to still say so."""
    try:
        with path.open(encoding="utf-8") as file:
            return CARD_MARK in file.read(_LIMIT_BYTES).splitlines()
    except (OSError, ValueError):
        return False


def model_card(model: Model, provenance: Provenance, *, format: str, dtype: str, proof: str) -> str:
    """Return README.md for an export.

    Texts that come from recipes, runs and manifests may be a stranger's: they stand in code
    spans and fences that they cannot close.

    Args:
        format: "gguf", or what transformers calls the architecture.
        dtype: of the stored weights.
        proof: a sentence, or several, about what was compared.
    """
    tags = ["mpt", "gguf"] if format == "gguf" else ["mpt"]
    front: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": tags}
    if format != "gguf":
        front = {"library_name": "transformers", **front}
    head = yaml.safe_dump(front, sort_keys=False).strip()
    sections = [
        f"---\n{head}\n---\n{CARD_MARK}",
        f"# {_one_line(provenance.run) if provenance.run else 'A language model'}",
        f"A decoder-only language model of {n_parameters(model):,} parameters, "
        f"MPT's architecture, stored as {dtype}.",
        _use(format),
        "## Model\n\n" + _fenced(_shape(model), "yaml"),
        "## Training\n\n" + "\n".join(_training(provenance)),
    ]
    if provenance.recipe is not None:
        details = "<details><summary>Recipe</summary>\n\n{}\n\n</details>"
        sections.append(details.format(_fenced(provenance.recipe.rstrip("\n"), "yaml")))
    sections += [
        f"## What was checked\n\n{proof}",
        "## License and intended use\n\nFor the owner of the model to state.",
    ]
    return "\n\n".join(sections) + "\n"


def _of_run(run_dir: Path, manifest: Manifest) -> dict[str, Any]:
    found = _json(run_dir / PROVENANCE)
    about: dict[str, Any] = {
        "datasets": _texts(found.get("datasets")),
        "created": _text(found.get("created")),
    }
    try:
        cfg = recipe.load(run_dir / RECIPE)
        about["run"] = cfg.run
        about["recipe"] = yaml.safe_dump(_without_places(asdict(cfg)), sort_keys=False, width=100)
    except RecipeError:  # gone, or of another version; its hash is in the manifest
        pass
    return about | _held_out(run_dir, manifest.step)


def _held_out(run_dir: Path, last_step: int) -> dict[str, Any]:
    """The last look at held-out data up to a step; of a step taken twice, the later time."""
    newest: tuple[int, dict[str, Any]] = (-1, {})
    for line in read_lines(run_dir / METRICS):
        step = line.get("step")
        if type(step) is int and newest[0] <= step <= last_step and "eval_loss" in line:
            newest = step, line
    step, line = newest
    if step < 0:
        return {}
    return {
        "eval_step": step,
        "eval_loss": _number(line["eval_loss"]),
        "eval_bits_per_byte": _number(line.get("eval_bits_per_byte")),
    }


def _use(format: str) -> str:
    if format == "gguf":
        return "## Use\n\n" + _fenced("llama-cli -m MODEL.gguf -p 'Once upon a time'", "sh")
    return "## Use\n\n" + _fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        'tokens = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
        "python",
    )


def _shape(model: Model) -> str:
    """The options that say what the model is: those without a default, and those off it."""
    values, shown = asdict(model), {}
    for field in fields(model):
        default = field.default if field.default is not MISSING else MISSING
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if default is MISSING or getattr(model, field.name) != default:
            shown[field.name] = values[field.name]
    return yaml.safe_dump(_without_places(shown), sort_keys=False, width=100).strip()


def _training(about: Provenance) -> Iterator[str]:
    if about.imported_from is not None:
        yield f"- imported from {_code(about.imported_from)}"
    if about.step:
        yield f"- {about.step:,} optimizer steps, {about.tokens:,} tokens read"
    elif about.imported_from is None:
        yield "- no step was taken here: the weights come from elsewhere"
    if about.train_loss is not None:
        yield (
            f"- training loss {about.train_loss:.4f} nats per token "
            f"(mean of the last {about.train_loss_steps} steps)"
        )
    if about.eval_loss is not None:
        bits = about.eval_bits_per_byte
        more = "" if bits is None else f", {bits:.4f} bits per byte"
        yield (
            f"- held-out loss {about.eval_loss:.4f} nats per token{more}, "
            f"at step {about.eval_step:,}"
        )
    if about.created is not None:
        yield f"- the run began {_code(about.created)}"
    if about.recipe_sha256 is not None:
        yield f"- recipe: sha256 {_code(about.recipe_sha256)}"
    for name, digest in about.datasets.items():
        yield f"- data, {_code(name)}: sha256 {_code(digest)}"
    if about.versions:
        packages = ", ".join(f"{_code(f'{name} {said}')}" for name, said in about.versions.items())
        yield f"- made with {packages}"


def _without_places(value: Any) -> Any:
    """Return a recipe's values without the directories of the machine and without secrets."""
    match value:
        case dict():
            return {str(key): _without_places(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_without_places(inner) for inner in value]
        case str() if value.startswith(("/", "~", "file:")):
            return Path(value).name
        case str() if is_url(value):
            return without_secrets(value)
        case _:
            return value


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing, if it is not there or damaged: a card can do without."""
    try:
        content = read_json(path, limit_bytes=_LIMIT_BYTES)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _texts(value: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any within it."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """A span of code on one line, whose fence is of another length than any within it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _one_line(text: str) -> str:
    """A title that is nothing but its letters."""
    return re.sub(r"[^\w .+-]", " ", " ".join(text.split()))
