"""Datasets written in one pass over the documents, so that a killed pass is gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpt.data import batches as batching
from mpt.data.about import About
from mpt.data.batches import Batch, Split, batches
from mpt.data.curate.gather import gather
from mpt.data.curate.heldout import HeldOut
from mpt.data.curate.judge import Judge
from mpt.data.curate.settle import Settler
from mpt.data.dataset import open_dataset
from mpt.data.encode import Encoder, id_dtype
from mpt.data.fingerprint import Fingerprint, fingerprint
from mpt.data.index import has_index
from mpt.data.journal import JOURNAL_NAME, START, Journal, drop_unfinished, read_journal
from mpt.data.pack import DatasetWriter, Packer, samples_per_shard
from mpt.data.plan import Plan, Progress, Stage
from mpt.data.pool import encoded
from mpt.data.shard import Encoding
from mpt.errors import DataError
from mpt.storage import fsync_dir
from mpt.tokenizer import Tokenizer


def write_datasets(plan: Plan, splits: list[Split], tokenizer: Tokenizer) -> None:
    """Write the absent datasets in one pass over the documents, and put them in place.

    Each is written in a directory beside its place. After a kill, or a failure, finished shards
    stay there with a journal; a call that finds the same source and settings goes on from them.
    """
    encoding = Encoding(id_dtype(tokenizer.vocab_size), plan.model.max_seq_len)
    samples_per_shard(encoding, plan.source.shard_bytes)  # refuse a shard too large before all
    absent = [split for split in splits if not _is_finished(plan, split, tokenizer)]
    if absent:
        seen = fingerprint(plan.found)
        with _held_out(plan) as held_out:
            packers = {
                split: _packer(plan, split, tokenizer, encoding, seen, held_out) for split in absent
            }
            if any(packer.has_shards for packer in packers.values()):
                plan.watch(Progress("resuming"))
            try:
                _fill(plan, packers, tokenizer, seen, held_out)
            except BaseException:
                _keep_finished_shards(plan, packers)
                raise
        _finish(plan, packers)
    for split in reversed(splits):
        path = plan.paths[split].resolve()
        (partial_of(path) / JOURNAL_NAME).unlink(missing_ok=True)
        partial_of(path).rename(path)
        fsync_dir(path.parent)


def partial_of(path: Path) -> Path:
    """Return where a dataset is written: beside its place, on the same disk."""
    place = path.resolve()
    return place.with_name(f"{place.name}.partial")


def _is_finished(plan: Plan, split: Split, tokenizer: Tokenizer) -> bool:
    """Say whether a killed call had only the last rename to do."""
    partial = partial_of(plan.paths[split])
    if not has_index(partial) or (partial / JOURNAL_NAME).exists():
        return False
    dataset = open_dataset(partial)
    about = dataset.about
    same = about is not None and about.beforehand() == plan.about(split, tokenizer)
    return same and dataset.sample_length == plan.model.max_seq_len


@contextmanager
def _held_out(plan: Plan) -> Iterator[HeldOut | None]:
    """Give the table of the texts that training must not see, if there are to be such."""
    curate = plan.source.curate
    if curate is None or curate.decontaminate is None:
        yield None
        return
    plan.watch(Progress("held-out"))
    folder = partial_of(plan.paths["train"]).parent
    source = batches(plan.documents(), plan.meter)
    table = gather(curate, source, plan.eval_fraction, folder, plan.cache)
    try:
        yield table
    finally:
        if table is not None:
            table.close()


def _packer(
    plan: Plan,
    split: Split,
    tokenizer: Tokenizer,
    encoding: Encoding,
    seen: Fingerprint,
    held_out: HeldOut | None,
) -> Packer:
    """Return what goes on where a killed call ended, or begins."""
    partial = partial_of(plan.paths[split])
    about = replace(plan.about(split, tokenizer), source_version=seen.version)
    header = _header(plan, about, encoding, seen, held_out)
    found = read_journal(partial, header, encoding)
    if found is None and partial.exists():
        if (partial / JOURNAL_NAME).exists():
            plan.watch(Progress("again"))
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    mark = found or START
    drop_unfinished(partial, mark)
    journal = Journal(partial)
    journal.begin(header, found if mark.shards else None)
    counted = tokenizer.vocab_size if about.curation is not None else 0
    writer = DatasetWriter(partial, encoding, plan.source.shard_bytes, mark.shards, n_ids=counted)
    return Packer(writer, about, journal, mark)


def _header(
    plan: Plan, about: About, encoding: Encoding, seen: Fingerprint, held_out: HeldOut | None
) -> dict[str, Any]:
    """Return all that the shards and the numbers of batches are a function of."""
    return ({} if held_out is None else {"held_out": held_out.digest()}) | {
        "about": asdict(about),
        "encoding": str(encoding),
        "shard_bytes": plan.source.shard_bytes,
        "batch": [batching.BATCH_CHARACTERS, batching.BATCH_DOCUMENTS],
        "source": seen.digest,
    }


def _fill(
    plan: Plan,
    packers: dict[Split, Packer],
    tokenizer: Tokenizer,
    seen: Fingerprint,
    held_out: HeldOut | None,
) -> None:
    """Tokenize every batch for the datasets that do not have it, and pack it."""

    def tell(stage: Stage, batch: Batch) -> None:
        abouts = [packer.about for packer in packers.values()]
        counts = Progress(
            stage,
            documents=sum(about.documents for about in abouts),
            text_bytes=sum(about.text_bytes for about in abouts),
            tokens=sum(about.tokens for about in abouts),
        )
        plan.watch(replace(counts, read_bytes=batch.read_bytes, source_bytes=seen.source_bytes))

    def wanted_of(batch: Batch) -> list[Split]:
        return [split for split, packer in packers.items() if packer.next_batch <= batch.number]

    def work(*, of_all: bool) -> Iterator[tuple[Batch, list[Split]]]:
        for batch in batches(plan.documents(), plan.meter):
            wanted = wanted_of(batch)
            if wanted or of_all:
                yield batch, wanted
            else:
                tell("resuming", batch)

    encoder, curate = Encoder(tokenizer, plan.eval_fraction), plan.source.curate
    if curate is None:
        for batch, result in encoded(work(of_all=False), encoder, plan.tokenizer, plan.workers):
            for split, tokens in result.items():
                packers[split].add(batch.number, tokens)
            tell("dataset", batch)
        return
    judge = Judge(curate, encoder, plan.eval_fraction, held_out)
    settler = Settler(curate)
    # What is finished is judged again for its duplicates, but not tokenized.
    to_judge = work(of_all=settler.remembers)
    for batch, judged in encoded(to_judge, judge, plan.tokenizer, plan.workers):
        wanted = wanted_of(batch)
        for split, tokens in settler.settle(batch, judged, wanted).items():
            packers[split].add(batch.number, tokens)
        tell("dataset" if wanted else "resuming", batch)


def _finish(plan: Plan, packers: dict[Split, Packer]) -> None:
    try:
        for packer in packers.values():
            packer.finish()
    except DataError:  # too little text: there is nothing to go on with
        for split in packers:
            shutil.rmtree(partial_of(plan.paths[split]))
        raise


def _keep_finished_shards(plan: Plan, packers: dict[Split, Packer]) -> None:
    """Leave nothing of a dataset without a shard; the rest is for the next call."""
    for split, packer in packers.items():
        if not packer.has_shards:
            shutil.rmtree(partial_of(plan.paths[split]), ignore_errors=True)
