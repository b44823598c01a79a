"""What a recipe says of its streams, as a mixture; and what each of them comes to in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mpt.data.dataset import open_dataset
from mpt.data.mixture import Mixture, Phase
from mpt.errors import DataError
from mpt.recipe.data import Data
from mpt.recipe.recipe import Recipe
from mpt.storage import is_url


@dataclass(frozen=True)
class Part:
    """One stream's part of a run."""

    name: str
    share: float
    """Of the run's samples."""
    tokens: int
    passes: float | None
    """How often the run reads the whole stream; null where its size is not known yet."""

    def __str__(self) -> str:
        passes = "" if self.passes is None else f", {self.passes:,.2f} passes"
        return f"{self.name} {self.share:.1%} = {self.tokens:,} tokens{passes}"


def names_of(data: Data) -> list[str]:
    """Return the streams in the order that the order of samples knows them by.

    By name, so that the order of lines in the recipe has no part in the order of samples.
    """
    return sorted(data.streams)


def mixture_of(data: Data, sizes: Sequence[int], global_batch_size: int) -> Mixture:
    """Return the mixture of a recipe.

    Args:
        sizes: samples of each stream, in the order of `names_of`.
    """
    names = names_of(data)
    phases = [Phase(0, tuple(_weight(data, *pair) for pair in zip(names, sizes, strict=True)))]
    for later in data.curriculum:
        weights = tuple(later.weights[name] for name in names)
        phases.append(Phase(later.from_step * global_batch_size, weights))
    return Mixture(tuple(phases))


def parts_of(cfg: Recipe, sizes: Mapping[str, int]) -> list[Part] | None:
    """Return what each stream comes to in the run; null if that hangs on a size not known.

    Args:
        sizes: samples of the streams whose data is there, by name.
    """
    names = names_of(cfg.data)
    if _by_size(cfg.data) and not sizes.keys() >= set(names):
        return None
    known = [sizes.get(name, 1) for name in names]
    mixture = mixture_of(cfg.data, known, cfg.train.global_batch_size)
    whole = _run_samples(cfg)
    return [
        Part(
            name,
            count / whole,
            count * cfg.model.max_seq_len,
            count / sizes[name] if name in sizes else None,
        )
        for name, count in zip(names, mixture.counts(whole), strict=True)
    ]


def sizes_here(data: Data) -> dict[str, int]:
    """Return the samples of those streams whose data is on this machine and whole."""
    found = {}
    for name, stream in data.streams.items():
        if not is_url(stream.path):
            with suppress(DataError):  # it may be made, or told of, when the run starts
                found[name] = len(open_dataset(stream.path, data.cache))
    return found


def misfit(cfg: Recipe, sizes: Mapping[str, int]) -> str | None:
    """Return a sentence if the streams ask for more or fewer tokens than the run reads.

    Their shares hold all the same. One step more or less is not worth a word.
    """
    names, step = names_of(cfg.data), cfg.train.global_batch_size
    if all(stream.measure == "weight" for stream in cfg.data.streams.values()):
        return None
    if _by_size(cfg.data) and not sizes.keys() >= set(names):
        return None
    length = cfg.model.max_seq_len
    wanted = sum(_weight(cfg.data, name, sizes.get(name, 1)) for name in names)
    wanted *= length if _by_size(cfg.data) else 1
    read = _run_samples(cfg) * length
    if abs(wanted - read) <= step * length:
        return None
    fitting = max(round(wanted / step / length), 1)
    return (
        f"data.streams ask for {wanted:,.0f} tokens, but the run reads {read:,} (train.steps "
        f"{cfg.train.steps:,} x {step:,} samples x {length:,} tokens), so each stream gets "
        f"{read / wanted:.3g} of what it asks for; train.steps={fitting} "
        "would fit."
    )


def _weight(data: Data, name: str, size: int) -> float:
    """Return a stream's share of the samples, relative to the others: its tokens or samples."""
    stream = data.streams[name]
    match stream.measure:
        case "tokens":
            return float(stream.tokens or 0)
        case "repeats":
            return (stream.repeats or 0.0) * size
        case "weight":
            return 1.0 if stream.weight is None else stream.weight


def _by_size(data: Data) -> bool:
    return any(stream.measure == "repeats" for stream in data.streams.values())


def _run_samples(cfg: Recipe) -> int:
    return cfg.train.steps * cfg.train.global_batch_size
