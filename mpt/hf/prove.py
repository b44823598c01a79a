"""Proof of an export: transformers computes from the written files what we compute from ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt.checkpoint.weights import Weights
from mpt.errors import ExportError
from mpt.hf.load import build_network
from mpt.hf.tokenizer import MODEL_FILE
from mpt.recipe.model import Model
from mpt.tokenizer import EOD_PIECE, SPACE_MARK, load_tokenizer

TOLERANCE = 1e-4
"""Largest difference of any logit, in fp32 on both sides; what rounding makes is about 1e-6."""

_ORDINARY = 100.0
"""Logits beyond this get a tolerance in proportion: of 800, fp32 itself knows only 6e-5."""

_SAMPLES = 2
_LENGTH = 256  # tokens; enough for ALiBi to have decayed in most heads

_HARD_TEXTS = (
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


def prove(out_dir: Path, weights: Weights, model: Model, dtype: torch.dtype) -> Proof | None:
    """Load `out_dir` with transformers and compare it with our own network and tokenizer.

    Our weights are rounded to `dtype`, as the exported ones are; both sides compute in fp32.
    Memory is that of one fp32 model: ours is gone before theirs is loaded. No host is reached.

    Returns:
        None when transformers is not installed.

    Raises:
        ExportError: if transformers cannot load the files, a logit differs by TOLERANCE or more
            (in proportion, where logits exceed 100), or a text gets other ids.
    """
    try:
        import transformers
    except ImportError:
        return None
    length = min(model.max_seq_len, _LENGTH)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (_SAMPLES, length), generator=generator)
    ours = _our_logits(weights, model, dtype, tokens)
    try:
        with _quiet():
            theirs = _their_logits(out_dir, tokens)
            n_texts = _compare_tokenizers(out_dir) if (out_dir / MODEL_FILE).exists() else 0
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"transformers {transformers.__version__} cannot load the export: {error}"
        ) from error
    difference = (ours - theirs).abs().max().item()
    limit = TOLERANCE * max(1.0, ours.abs().max().item() / _ORDINARY)
    if not difference < limit:  # also when it is NaN
        raise ExportError(
            f"the export is wrong: logits in transformers {transformers.__version__} differ from "
            f"ours by up to {difference:.3g}, and less than {limit:.1g} is what rounding makes."
        )
    return Proof(difference, tokens.numel(), n_texts, transformers.__version__)


@torch.inference_mode()
def _our_logits(weights: Weights, model: Model, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    network = build_network(model, lambda name: weights.read(name).to(dtype).float())
    logits: Tensor = network(tokens)  # (B, S, V)
    return logits


@torch.inference_mode()
def _their_logits(out_dir: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out_dir,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    network, loading = loaded
    if unmatched := {kind: names for kind, names in loading.items() if names}:
        raise ExportError(f"transformers does not take the weights as they are: {unmatched}")
    logits: Tensor = network.eval()(tokens).logits  # (B, S, V)
    return logits


def _compare_tokenizers(out_dir: Path) -> int:
    """Return how many texts got the same ids and came back the same."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out_dir, local_files_only=True, trust_remote_code=False)
    ours = load_tokenizer(out_dir / MODEL_FILE)
    for text in _HARD_TEXTS:
        ids = ours.encode(text)
        if theirs.encode(text) != ids or theirs.decode(ids) != text:
            raise ExportError(f"the export is wrong: AutoTokenizer gives other ids for {text!r}.")
    return len(_HARD_TEXTS)


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
