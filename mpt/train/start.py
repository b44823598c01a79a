"""From a recipe to running workers: data made or checked, recipe frozen, run locked, launched."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpt import recipe
from mpt.checkpoint.layout import committed, model_of, newest, read_manifest, step_of
from mpt.data.dataset import check_dataset, open_dataset, verify
from mpt.data.plan import Watch
from mpt.data.prepare import prepare
from mpt.data.streams import misfit, parts_of
from mpt.errors import EXIT_DONE, DataError, UsageError
from mpt.launch.node import Node
from mpt.launch.place import Place
from mpt.launch.plan import count_gpus, n_workers, worker_environment
from mpt.launch.run import Run
from mpt.launch.supervisor import supervise
from mpt.log import Journal, read_lines, utc_now
from mpt.recipe import Recipe
from mpt.rundir import CHECKPOINTS, EVENTS, METRICS, PROVENANCE, RECIPE, RECIPE_SOURCE, versions
from mpt.storage import atomic_write, hash_file, read_json
from mpt.tokenizer import load_tokenizer

FIXED_FOR_A_RUN = ("run", "seed", "model.", "data.", "train.global_batch_size", "optimizer.name")
"""Keys, or beginnings of keys, that a run keeps: weights, moments and sample order hang on them.
Paths may change: what lies there is known by its hash."""
MAY_CHANGE = ("data.verify", "data.cache.", "data.on_bad_sample", "data.bad_sample_budget")
"""Those among them that the sample order does not hang on."""

Tell = Callable[[str], None]
Progress = Callable[[], AbstractContextManager[Watch]]


def start(
    cfg: Recipe,
    run_dir: Path,
    *,
    source: Path | None,
    place: Place,
    tell: Tell,
    progress: Progress,
) -> int:
    """Train `cfg` in `run_dir`, from its newest checkpoint if there is one.

    Args:
        source: the recipe file as the user wrote it, kept beside the resolved one.
        place: where this node is, among those of the run.
        tell: is given a sentence for each thing a person should know.
        progress: is open while data is prepared, and told how far that has come.

    Returns:
        The exit code of `mpt`.

    Raises:
        UsageError: if the run directory is another run's, or is in use.
        DataError: if data is missing, corrupt or made for another model.
    """
    cfg = recipe.absolute(cfg)
    run_dir = run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    n_gpus = count_gpus()
    nproc = n_workers(cfg.launch.nproc, n_gpus)
    if 0 < n_gpus < nproc:
        raise UsageError(f"launch.nproc: {nproc} workers, but {n_gpus} GPUs here; one each.")
    n_cpus = len(os.sched_getaffinity(0))
    node = Node(
        run_dir,
        place.node,
        nproc=nproc,
        environment=worker_environment(nproc, n_cpus, n_gpus, os.environ),
        hang=cfg.launch.hang,
        on_gpus=n_gpus > 0,
    )

    def newest_step() -> int:
        return max(map(step_of, committed(run_dir / CHECKPOINTS)), default=-1)

    run = Run(
        run_dir,
        cfg.launch,
        identity=recipe.recipe_hash(replace(cfg, launch=replace(cfg.launch, nproc="auto"))),
        place=place,
        prepare=lambda: _make_ready(cfg, run_dir, source, tell, progress),
        committed=newest_step,
        is_done=lambda: newest_step() >= cfg.train.steps and _has_finished(run_dir),
    )
    code = supervise(run, node)
    tell(_last_word(code, run_dir))
    return code


def _has_finished(run_dir: Path) -> bool:
    """Whether the last attempt came to its end, evaluation included."""
    kinds = [event.get("event") for event in read_lines(run_dir / EVENTS)]
    started = len(kinds) - kinds[::-1].index("attempt_started") if "attempt_started" in kinds else 0
    return "finished" in kinds[started:]


def _make_ready(
    cfg: Recipe, run_dir: Path, source: Path | None, tell: Tell, progress: Progress
) -> None:
    """Make data and run directory what the workers expect; by one node, which has the run."""
    changes = _changes(cfg, run_dir)
    taken = max(map(step_of, committed(run_dir / CHECKPOINTS)), default=0)
    if taken > cfg.train.steps:
        raise UsageError(
            f"{run_dir}: has taken {taken:,} steps, and train.steps is {cfg.train.steps:,}; "
            f"nothing is left to do. Raise it, or use another --run-dir."
        )
    if cfg.train.init_from is not None and not committed(run_dir / CHECKPOINTS):
        _check_beginning(cfg, Path(cfg.train.init_from), tell)
    with progress() as watch:
        prepare(cfg, progress=watch)
    dataset_hashes, lineage, sizes = _check_data(cfg)
    for part in parts_of(cfg, sizes) or ():
        tell(f"stream {part}")
    if (said := misfit(cfg, sizes)) is not None:
        tell(said)
    _check_same_data(run_dir, dataset_hashes)
    _write_run_directory(cfg, run_dir, source, {"datasets": dataset_hashes, "lineage": lineage})
    if changes:
        Journal(run_dir).event("recipe_changed", changes=changes)
        for key, (old, new) in changes.items():
            tell(f"changed for the rest of this run: {key}: {old} -> {new}")


def thaw(run_dir: Path, overrides: list[str]) -> Recipe:
    """Return the recipe of a run directory, with keys changed.

    Raises:
        UsageError: if it is not a run directory.
    """
    path = run_dir / RECIPE
    if not path.is_file():
        raise UsageError(f"{run_dir}: is not a run directory: it has no {RECIPE}.")
    return recipe.load(path, overrides)


def _last_word(code: int, run_dir: Path) -> str:
    """Say how the run ended and what comes next."""
    newest = next(iter(committed(run_dir / CHECKPOINTS)), None)
    saved = "nothing saved yet" if newest is None else f"saved at step {step_of(newest):,}"
    if code == EXIT_DONE:
        return f"finished, {saved}; next: mpt export {run_dir} OUT_DIR"
    return f"stopped, {saved}; to go on: mpt resume {run_dir}"


def _changes(cfg: Recipe, run_dir: Path) -> dict[str, tuple[object, object]]:
    """Return what is changed against the run so far, refusing what cannot be."""
    path = run_dir / RECIPE
    if not path.exists() or _is_untouched(run_dir):
        return {}
    changes = recipe.differences(recipe.load(path), cfg)
    refused = [
        f"{key}: {old!r} in the run, {new!r} now"
        for key, (old, new) in changes.items()
        if key.startswith(FIXED_FOR_A_RUN)
        and not key.startswith(MAY_CHANGE)
        and not key.endswith(".path")
    ]
    if refused:
        raise UsageError(
            f"{run_dir}: was started with another recipe, and these cannot change: "
            f"{'; '.join(refused)}. Use another --run-dir for a new run."
        )
    return changes


def _is_untouched(run_dir: Path) -> bool:
    """Whether no step was ever taken there: a start that failed ties a run to nothing."""
    return not committed(run_dir / CHECKPOINTS) and not (run_dir / METRICS).exists()


def _check_beginning(cfg: Recipe, source: Path, tell: Tell) -> None:
    """Say what a run would begin with, and in what the recipe's model differs from it.

    Raises:
        CheckpointError: if there is no checkpoint.
        UsageError: if its weights know another tokenizer's ids.
    """
    directory = newest(source)
    manifest = read_manifest(directory)
    there, here = asdict(model_of(directory, manifest)), asdict(cfg.model)
    for key in (key for key in here if here[key] != there[key]):
        tell(f"model.{key} is {here[key]!r}, and was {there[key]!r} in {directory}")
    hashes = {file.sha256 for file in manifest.files if file.kind == "tokenizer"}
    path = Path(cfg.tokenizer.path)
    if hashes and not path.exists():
        raise UsageError(
            f"tokenizer.path: {path} is not there, and another one would be made. The tokenizer "
            f"of these weights is in {directory}; name it, or copy it there."
        )
    if hashes and hash_file(path) not in hashes:
        raise UsageError(
            f"train.init_from: {directory} was trained with another tokenizer than {path}. "
            "Its tokenizer is in that directory; name it as tokenizer.path."
        )


def _check_data(cfg: Recipe) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Check tokenizer and datasets before any worker is started.

    Returns:
        By name: what identifies each; what each dataset that mpt made says of how it came to be;
        and the samples of each.
    """
    tokenizer = load_tokenizer(Path(cfg.tokenizer.path))
    found, lineage, sizes = {"tokenizer": tokenizer.sha256}, {}, {}
    paths = {name: stream.path for name, stream in cfg.data.streams.items()}
    if cfg.data.eval is not None:
        paths["eval"] = cfg.data.eval.path
    for name, path in paths.items():
        dataset = open_dataset(path, cfg.data.cache)
        check_dataset(dataset, cfg.model, tokenizer)
        # A remote shard is verified when it is fetched: to fetch all now could take days.
        if cfg.data.verify and not dataset.is_remote and (faults := verify(dataset)):
            raise DataError("; ".join(faults))
        found[name], sizes[name] = dataset.index_sha256, len(dataset)
        if dataset.about is not None:
            lineage[name] = asdict(dataset.about)
    return found, lineage, sizes


def _check_same_data(run_dir: Path, found: dict[str, str]) -> None:
    """Refuse to go on with other data: samples would be skipped, or mean something else."""
    if not (run_dir / PROVENANCE).exists() or _is_untouched(run_dir):
        return
    before = read_json(run_dir / PROVENANCE, limit_bytes=1 << 20)["datasets"]
    other = [name for name, sha in found.items() if before.get(name, sha) != sha]
    if other:
        raise DataError(
            f"{run_dir}: was started with other content of {', '.join(other)} (by the hashes in "
            f"{PROVENANCE}). Put that back, or use another --run-dir for a new run."
        )


def _write_run_directory(
    cfg: Recipe, run_dir: Path, source: Path | None, data: dict[str, Any]
) -> None:
    recipe.freeze(cfg, run_dir / RECIPE)
    begins = _is_untouched(run_dir)
    if source is not None and (begins or not (run_dir / RECIPE_SOURCE).exists()):
        shutil.copyfile(source, run_dir / RECIPE_SOURCE)
    if begins or not (run_dir / PROVENANCE).exists():
        provenance: dict[str, Any] = {
            "recipe_sha256": recipe.recipe_hash(cfg),
            **data,
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "versions": versions(),
            "created": utc_now(),
        }
        atomic_write(run_dir / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
