"""The commands of the README, run as a user runs them, and the mistakes a newcomer makes."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpt.tokenizer import train_tokenizer
from tests.e2e.conftest import Small, await_that, lines


@pytest.fixture(scope="module")
def run_dir(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twenty steps on one worker."""
    path = tmp_path_factory.mktemp("commands") / "run"
    small.mpt("train", small.recipe, "--run-dir", path)
    return path


@pytest.fixture(scope="module")
def exported(small: Small, run_dir: Path) -> Path:
    out = run_dir.parent / "exported"
    done = small.mpt("export", run_dir, out)
    assert "computes the same" in done.stdout
    return out


def test_a_run_directory_holds_what_the_contract_says(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "recipe.yaml",
        "recipe.source.yaml",
        "provenance.json",
        "chosen.json",
        "lock",
        "metrics.jsonl",
        "events.jsonl",
        "logs",
        "checkpoints",
    }
    steps = [record for record in lines(run_dir / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert steps[-1]["tokens"] == 20 * 6 * 32
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) >= {
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "step_s",
        "samples",
        "time",
    }
    held_out = [r for r in lines(run_dir / "metrics.jsonl") if "eval_loss" in r]
    assert [record["step"] for record in held_out] == [10, 20]
    assert held_out[1]["eval_bits_per_byte"] < held_out[0]["eval_bits_per_byte"]
    kinds = [event["event"] for event in lines(run_dir / "events.jsonl")]
    assert kinds[0] == "attempt_started"
    assert kinds[-1] == "finished"
    assert kinds.count("checkpoint") == 4
    assert (run_dir / "logs" / "attempt-0" / "rank-0.log").is_file()


def test_master_weights_and_moments_are_fp32_whatever_the_compute_dtype(
    small: Small, run_dir: Path, tmp_path: Path
) -> None:
    bf16 = tmp_path / "bf16"
    small.mpt("train", small.recipe, "train.precision=bf16", "--run-dir", bf16)
    newest = bf16 / "checkpoints" / "step-00000020"
    for kind in ("weights", "optimizer"):
        for name, tensor in load_file(newest / f"{kind}-00001-of-00001.safetensors").items():
            assert tensor.dtype == torch.float32, name
    ours, theirs = (lines(path / "metrics.jsonl") for path in (bf16, run_dir))
    for mine, reference in zip(ours, theirs, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(reference["loss"], rel=0.02)
            assert mine["loss"] != reference["loss"], "bf16 was not used"


def test_compiled_blocks_train_to_the_same_losses(small: Small, tmp_path: Path) -> None:
    for name, compiled in (("ours", "true"), ("theirs", "false")):
        changes = ["model.resid_pdrop=0.0", f"train.compile={compiled}"]  # masks would differ
        small.mpt("train", small.recipe, *changes, "--run-dir", tmp_path / name)
    ours, theirs = (lines(tmp_path / name / "metrics.jsonl") for name in ("ours", "theirs"))
    for mine, reference in zip(ours, theirs, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-3)


def test_status_reads_files_only(small: Small, run_dir: Path) -> None:
    found = json.loads(small.mpt("status", run_dir, "--json").stdout)
    assert found["state"] == "finished"
    assert (found["step"], found["steps"], found["faults"]) == (20, 20, 0)
    assert found["checkpoints"] == [20, 15, 10, 5]
    assert "finished" in small.mpt("status", run_dir).stdout


def test_verify_passes_a_sound_run(small: Small, run_dir: Path) -> None:
    found = json.loads(small.mpt("verify", run_dir, "--json").stdout)
    assert len(found) == 4
    assert not any(found.values())


def test_an_exported_model_works_in_transformers_with_no_code_of_ours(exported: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    prompt = tokenizer("def main(", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]


def test_generate_gives_the_same_text_from_run_checkpoint_and_export(
    small: Small, run_dir: Path, exported: Path
) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000020"
    texts = {
        small.mpt("generate", source, "def main(", "--tokens", "20", "--seed", "7").stdout
        for source in (run_dir, checkpoint, exported)
    }
    assert len(texts) == 1
    assert texts.pop().startswith("def main(")


def test_an_export_for_llama_cpp_is_one_file_that_was_read_back(
    small: Small, run_dir: Path, tmp_path: Path
) -> None:
    done = small.mpt("export", run_dir, tmp_path / "small.gguf", "--format", "gguf", "--json")
    assert json.loads(done.stdout)["files"] == ["small.gguf"]
    assert json.loads(done.stdout)["proof"]["n_tokens"] > 0
    assert (tmp_path / "small.gguf").read_bytes()[:4] == b"GGUF"


def test_an_imported_model_is_trained_on_from_where_it_was(
    small: Small, run_dir: Path, exported: Path, tmp_path: Path
) -> None:
    imported, on, other = tmp_path / "imported", tmp_path / "on", tmp_path / "other.model"
    small.mpt("import", exported, imported)
    frozen = ("train.steps=1", "schedule.warmup_steps=0", "optimizer.lr=1e-12")
    begin = f"train.init_from={imported}"
    small.mpt("train", small.recipe, begin, *frozen, "--run-dir", on)
    before, after = (
        [r["eval_loss"] for r in lines(path / "metrics.jsonl") if "eval_loss" in r][-1]
        for path in (run_dir, on)
    )
    assert after == pytest.approx(before, rel=1e-4)
    train_tokenizer(["other words " * 50], other, vocab_size=270)
    refused = small.mpt(
        "train",
        small.recipe,
        begin,
        f"tokenizer.path={other}",
        "--run-dir",
        tmp_path / "x",
        code=2,
    )
    assert "was trained with another tokenizer" in refused.stderr
    nowhere = f"tokenizer.path={tmp_path}/none.model"
    refused = small.mpt("train", small.recipe, begin, nowhere, "--run-dir", tmp_path / "y", code=2)
    assert f"is in {imported}; name it" in refused.stderr


def test_an_export_is_written_over_only_if_asked(
    small: Small, run_dir: Path, exported: Path
) -> None:
    assert "overwrite" in small.mpt("export", run_dir, exported, code=2).stderr
    small.mpt("export", run_dir, exported, "--overwrite", "--dtype", "bf16")


def test_export_passes_over_a_damaged_checkpoint_and_says_so(
    small: Small, run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "checkpoints" / "step-00000020" / "weights-00001-of-00001.safetensors").unlink()
    done = small.mpt("export", copy, tmp_path / "out")
    assert "step-00000020 is damaged and was passed over" in done.stderr


def test_a_second_launch_on_a_run_directory_is_refused_by_name(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    first = small.start("train", small.recipe, "train.steps=100000", "--run-dir", run)
    children.append(first)
    await_that(lambda: lines(run / "events.jsonl"), first)
    refused = small.mpt("train", small.recipe, "train.steps=100000", "--run-dir", run, code=2)
    assert f"{first.pid}@" in refused.stderr
    assert json.loads(small.mpt("status", run, "--json").stdout)["held_by"].startswith(
        f"{first.pid}@"
    )


def test_no_worker_outlives_its_supervisor(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = small.start("train", small.recipe, "train.steps=100000", "--run-dir", run)
    children.append(process)
    events = await_that(lambda: lines(run / "events.jsonl"), process)
    await_that(lambda: lines(run / "metrics.jsonl"), process)
    process.kill()
    process.wait()
    (worker,) = events[0]["pids"]
    gone = subprocess.run(
        ["tail", f"--pid={worker}", "-f", "/dev/null"], timeout=30, check=False
    )  # returns once the worker is no more
    assert gone.returncode == 0


def test_what_a_run_hangs_on_cannot_change_and_what_can_is_told(
    small: Small, run_dir: Path
) -> None:
    refused = small.mpt("resume", run_dir, "model.n_layers=3", "seed=9", code=2).stderr
    assert "model.n_layers: 2 in the run, 3 now" in refused
    assert "seed: 5 in the run, 9 now" in refused
    told = small.mpt("resume", run_dir, "optimizer.lr=1e-4").stderr
    assert "optimizer.lr: 0.003 -> 0.0001" in told
    (changed,) = [e for e in lines(run_dir / "events.jsonl") if e["event"] == "recipe_changed"]
    assert changed["changes"] == {"optimizer.lr": [0.003, 0.0001]}


def test_a_corrupt_shard_ends_the_run_before_a_worker_starts(small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.root / "train", tmp_path / "train")
    shard = tmp_path / "train" / "shard.00000.mds"
    payload = bytearray(shard.read_bytes())
    payload[-3] ^= 4
    shard.write_bytes(payload)
    override = f"data.streams.stdlib.path={tmp_path / 'train'}"
    done = small.mpt("train", small.recipe, override, "--run-dir", tmp_path / "run", code=3)
    assert "shard.00000.mds" in done.stderr
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_diverging_run_rolls_back_as_often_as_it_may_and_then_stops_with_its_reason(
    small: Small, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = small.mpt(
        "train",
        small.recipe,
        "optimizer.lr=1e30",
        "train.steps=60",
        "optimizer.weight_decay=0.0",
        "health.max_rollbacks=1",
        "--run-dir",
        run,
        code=6,
    )
    assert "were skipped in a row" in done.stderr
    assert f"mpt resume {run} health.max_rollbacks=" in done.stderr
    kinds = [e["event"] for e in lines(run / "events.jsonl")]
    assert kinds.count("rollback") == 1
    assert kinds.count("attempt_started") == 2
    assert "fault" not in kinds, "a loss that is not a number is nobody's fault"


def test_a_worker_that_keeps_dying_uses_up_the_budget(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = small.start(
        "train", small.recipe, "launch.max_restarts=0", "train.steps=100000", "--run-dir", run
    )
    children.append(process)
    events = await_that(lambda: lines(run / "events.jsonl"), process)
    subprocess.run(["kill", "-SEGV", str(events[0]["pids"][0])], check=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5, said
    assert "SIGSEGV" in said
    assert f"mpt resume {run}" in said


def test_init_writes_a_recipe_that_checks(small: Small, tmp_path: Path) -> None:
    assert "tiny" in small.mpt("init").stdout
    for code in (0, 2):  # the second time it is there already
        done = subprocess.run(
            small.command("init", "tiny"), cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    small.mpt("train", tmp_path / "tiny.yaml", "--check")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "no-such.yaml"], 2, "no such file"),
        (["train", "tiny"], 2, "mpt init tiny"),
        (["train"], 2, "Missing argument"),
        (["status", "."], 2, "not a run directory"),
        (["resume", "nowhere"], 2, "not a run directory"),
        (["export", "nowhere", "out"], 4, "there is no such directory"),
        (["generate", "nowhere", "x"], 4, "there is no such directory"),
        (["verify", "nowhere"], 4, "there is no such directory"),
        (["data", "verify", "nowhere"], 3, "nowhere"),
        (["init", "mpt-900b"], 2, "mpt-900b"),
        (["trian", "tiny.yaml"], 2, "trian"),
        (["train", "small.yaml", "--run-dir", "/dev/null/x"], 2, "Not a directory"),
    ],
)
def test_a_newcomers_mistake_gets_a_sentence_and_its_exit_code(
    small: Small, arguments: list[str], code: int, said: str
) -> None:
    assert said in small.mpt(*arguments, code=code).stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_a_caller_that_closed_its_streams_harms_no_run(
    small: Small, tmp_path: Path, closed: str
) -> None:
    run_dir = tmp_path / "run"
    command = small.command("train", small.recipe, "--run-dir", run_dir, "train.steps=5")
    done = subprocess.run(f"exec {shlex.join(command)} {closed}", shell=True, timeout=120)
    assert done.returncode == 0
    assert lines(run_dir / "events.jsonl")[-1]["event"] == "finished"
