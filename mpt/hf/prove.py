"""Proof of an export: transformers computes from the written files what we compute from ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpt.checkpoint.weights import Weights
from mpt.errors import ExportError
from mpt.hf.directory import open_directory
from mpt.hf.load import build_network
from mpt.hf.names import Architecture, names_there, shapes_of
from mpt.model.network import MPT
from mpt.recipe.model import Model
from mpt.tokenizer import EOD_PIECE, SPACE_MARK, Tokenizer, load_tokenizer

TOLERANCE = 1e-4
"""Largest difference of any logit, in fp32 on both sides; what rounding makes is about 1e-6."""

_ORDINARY = 100.0
"""Logits beyond this get a tolerance in proportion: of 800, fp32 itself knows only 6e-5."""

_SAMPLES = 2
_LENGTH = 256  # tokens; enough for ALiBi to have decayed in most heads
_PROMPT, _GENERATED = 8, 32  # tokens
_BLOCK_ROWS = 4096
"""Rows compared at a time."""

HARD_TEXTS = (
    "def main(argv):\n    return [x for x in argv if x]\n",
    "\t\tif a  ==  b:\r\n\n\n",
    "  leading and trailing  ",
    "\x00\x07\x1b[0m",
    "naïve café, caf\u0065\u0301, Straße, 東京, עברית, \U0001f469\u200d\U0001f4bb",
    f"{SPACE_MARK}{SPACE_MARK} a{SPACE_MARK}",
    f"{EOD_PIECE}<unk><s></s><0x0A>",
    "-" * 300 + "=" * 77,
)


@dataclass(frozen=True)
class Proof:
    """What was compared, and how far apart it was."""

    max_difference: float
    """Largest absolute difference of a logit."""
    n_tokens: int
    """Positions whose logits were compared."""
    n_texts: int
    """Texts whose token ids and decoded text were compared; 0 without a tokenizer."""
    transformers: str
    """The version that was asked."""
    n_generated: int = 0
    """Tokens that transformers generated, each the likeliest here as well."""
    n_layers: int = 0
    """Blocks that took part in these logits, the first ones."""
    n_tensors: int = 0
    """Tensors that were read back and are, bit for bit, what they should be; 0 if every block
    took part in the logits, which proves more."""

    def __str__(self) -> str:
        said = (
            f"transformers {self.transformers} computes the same from these files: logits of "
            f"{self.n_tokens:,} tokens differ by {self.max_difference:.1e} at most, and the "
            f"{self.n_generated:,} tokens it generates greedily are the likeliest here too"
        )
        if self.n_tensors:
            said += (
                f" (with the first {self.n_layers:,} blocks, for the whole model would not fit "
                f"the memory set; all {self.n_tensors:,} tensors were read back and are equal "
                "bit for bit)"
            )
        if self.n_texts:
            said += f". Ids and decoded text of {self.n_texts:,} texts are equal"
        return said + "."


def prove(
    out_dir: Path,
    weights: Weights,
    model: Model,
    tokenizer_file: Path | None,
    architecture: Architecture,
    dtype: torch.dtype | None,
    memory_bytes: int,
) -> Proof | None:
    """Load `out_dir` with transformers and compare it with our own network and tokenizer.

    Our weights are rounded to `dtype`, as the exported ones are; both sides compute in fp32. No
    host is reached.

    Args:
        memory_bytes: what one network may take; theirs is gone before ours is loaded. Of a
            larger model the first blocks are compared, as many as fit, but at least one; and
            every tensor is read back and compared bit for bit.

    Returns:
        None when transformers is not installed.

    Raises:
        ExportError: if transformers cannot load the files, a logit differs by TOLERANCE or more
            (in proportion, where logits exceed 100), it generates something else, or a text
            gets other ids.
    """
    try:
        import transformers
    except ImportError:
        return None
    version: str = transformers.__version__
    shallow = replace(model, n_layers=_depth(model, memory_bytes), block_overrides=None)
    n_tensors = 0 if shallow.n_layers == model.n_layers else _compare(out_dir, weights, dtype)
    expected = names_there(model, architecture).keys() - names_there(shallow, architecture).keys()
    tokens = _tokens(model)
    try:
        with _quiet():
            answer = _ask(out_dir, shallow.n_layers, expected, tokens)
            n_texts = 0
            if tokenizer_file is not None:
                n_texts = _compare_tokenizers(out_dir, load_tokenizer(tokenizer_file), answer)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ExportError(f"transformers {version} cannot load the export: {error}") from error
    except ArithmeticError as error:
        raise ExportError(f"transformers {version} cannot run the export: {error}") from error
    network = build_network(shallow, lambda name: _rounded(weights.read(name), dtype).float())
    difference = _compare_logits(network, tokens, answer, version)
    return Proof(
        max_difference=difference,
        n_tokens=tokens.numel(),
        n_texts=n_texts,
        transformers=version,
        n_generated=len(answer.generated) - answer.n_given,
        n_layers=shallow.n_layers,
        n_tensors=n_tensors,
    )


@torch.inference_mode()
def _compare_logits(network: MPT, tokens: Tensor, answer: _Answer, version: str) -> float:
    """Return the largest difference of a logit, having looked at what was generated as well."""
    ours: Tensor = network(tokens)  # (B, S, V)
    limit = TOLERANCE * max(1.0, ours.abs().max().item() / _ORDINARY)
    difference = (ours - answer.logits).abs().max().item()
    if not difference < limit:  # also when it is NaN
        raise ExportError(
            f"the export is wrong: logits in transformers {version} differ from "
            f"ours by up to {difference:.3g}, and less than {limit:.1g} is what rounding makes."
        )
    going_on: Tensor = network(answer.generated[None])[0]  # (S', V)
    before = going_on[answer.n_given - 1 : -1]  # what each generated token was chosen by
    chosen = before.gather(1, answer.generated[answer.n_given :, None])[:, 0]
    if not bool((before.max(dim=1).values - chosen < limit).all()):  # two may be as likely
        raise ExportError(
            f"the export is wrong: transformers {version} generates tokens, greedily, that are "
            "not the likeliest here."
        )
    return difference


def _depth(model: Model, memory_bytes: int) -> int:
    """Return how many blocks of a model fit, in fp32, beside what is no block."""
    sizes = {name: prod(shape) * torch.float32.itemsize for name, shape in shapes_of(model).items()}
    block = sum(size for name, size in sizes.items() if name.startswith("transformer.blocks.0."))
    rest = sum(sizes.values()) - block * model.n_layers
    return min(model.n_layers, max(1, (memory_bytes - rest) // block))


def _compare(out_dir: Path, weights: Weights, dtype: torch.dtype | None) -> int:
    """Return how many tensors were read back and found to be the same bits."""
    written = open_directory(out_dir).weights
    for name, shape in weights.shapes.items():
        for start in range(0, shape[0], _BLOCK_ROWS):
            rows = (start, min(start + _BLOCK_ROWS, shape[0]))
            ours, theirs = _rounded(weights.read(name, rows), dtype), written.read(name, rows)
            if ours.dtype != theirs.dtype or not torch.equal(_bits(ours), _bits(theirs)):
                raise ExportError(f"the export is wrong: {name} is not what was to be written.")
    return len(weights.shapes)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _tokens(model: Model) -> Tensor:
    length = min(model.max_seq_len, _LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (_SAMPLES, length), generator=generator)


class _Answer(NamedTuple):
    """What transformers makes of an export."""

    logits: Tensor
    """(B, S, V)"""
    generated: Tensor
    """(S',): a prompt and what follows it."""
    n_given: int
    """Tokens of the prompt."""


@torch.inference_mode()
def _ask(out_dir: Path, n_layers: int, expected: set[str], tokens: Tensor) -> _Answer:
    """Load the export with transformers and have it run.

    Args:
        n_layers: of the network to load.
        expected: tensors that are in the files and have no place in it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(out_dir, local_files_only=True)
    context = tokens.shape[1]
    config.num_hidden_layers = n_layers
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out_dir,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    network, loading = loaded
    unmatched = {kind: set(names) - expected for kind, names in loading.items()}
    if any(unmatched.values()):
        raise ExportError(f"transformers does not take the weights as they are: {unmatched}")
    network.eval()
    logits: Tensor = network(tokens).logits
    prompt = tokens[:1, : min(_PROMPT, context // 2)]
    generated: Tensor = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(_GENERATED, context - prompt.shape[1]),
        do_sample=False,
    )
    return _Answer(logits, generated[0], prompt.shape[1])


def _compare_tokenizers(out_dir: Path, ours: Tokenizer, answer: _Answer) -> int:
    """Return how many texts got the same ids and came back the same."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out_dir, local_files_only=True, trust_remote_code=False)
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        if theirs.encode(text) != ids or theirs.decode(ids) != text:
            raise ExportError(f"the export is wrong: AutoTokenizer gives other ids for {text!r}.")
    # Of what was generated: the embedding may have rows that are no token, and tokens be no text.
    ids = [token for token in answer.generated.tolist() if token < ours.vocab_size]
    text = ours.decode(ids)
    if "\ufffd" not in text and theirs.decode(ids, skip_special_tokens=True) != text:
        raise ExportError(f"the export is wrong: AutoTokenizer gives other text for ids {ids}.")
    return len(HARD_TEXTS) + ("\ufffd" not in text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal, and put them back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
