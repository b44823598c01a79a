"""`mpt submit` with stand-ins for sbatch and kubectl on the PATH."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import yaml

from mpt.launch.kubernetes import Kind
from tests.cli.test_cli import TINY, mpt
from tests.launch.test_kubernetes import KINDS


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for sbatch and kubectl that write down their arguments and what they are given."""
    for name, answer in (("sbatch", "Submitted batch job 42"), ("kubectl", "job created")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            "#!/bin/bash\n"
            f"printf '%s\\0' \"$@\" >{tmp_path}/{name}.argv\n"
            f'cp -- "${{@: -1}}" {tmp_path}/{name}.given\n'
            f"[[ ! -e {tmp_path}/refuse ]] || {{ echo 'no such queue' >&2; exit 7; }}\n"
            f"echo '{answer}'\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


PODS = ["--scheduler", "kubernetes", "--image", "mpt", "--claim", "runs"]


def test_sbatch_is_given_the_script_that_the_dry_run_prints(scheduler: Path) -> None:
    arguments = ["submit", str(TINY), "seed=3", "--scheduler", "slurm", "--nodes", "2:3"]
    arguments += ["--gpus-per-node", "4", "--run-dir", "my run"]
    code, printed, err = mpt(*arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert not (scheduler / "sbatch.argv").exists()
    assert not list((scheduler / "here").iterdir())
    code, out, err = mpt(*arguments)
    assert (code, out) == (0, "Submitted batch job 42\n")
    assert "my run/submit.sbatch" in err
    assert (scheduler / "sbatch.given").read_text() == printed
    path = scheduler / "here" / "my run" / "submit.sbatch"
    assert (scheduler / "sbatch.argv").read_text() == f"{path}\0"
    words = ["train", str(TINY), "seed=3", "--run-dir", str(path.parent), "--nnodes", "2:3"]
    assert f"{shlex.join(words)} ||" in printed
    assert "#SBATCH --nodes=2-3\n" in printed


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_kubectl_is_given_the_manifests_that_the_dry_run_prints(
    scheduler: Path, kind: Kind | None
) -> None:
    arguments = ["submit", str(TINY), "seed=3", *PODS, "--nodes", "2", "--gpus-per-node", "4"]
    arguments += [] if kind is None else ["--kind", kind]
    code, printed, err = mpt(*arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert not list((scheduler / "here").iterdir())
    code, out, _ = mpt(*arguments)
    assert (code, out) == (0, "job created\n")
    assert (scheduler / "kubectl.given").read_text() == printed
    assert (scheduler / "kubectl.argv").read_text() == "apply\0-f\0tiny.kubernetes.yaml\0"
    found = {document["kind"]: document for document in yaml.safe_load_all(printed)}
    assert found["ConfigMap"]["data"]["recipe.yaml"] == TINY.read_text()
    kinds = {"trainjob": "TrainJob", "jobset": "JobSet", "job": "Job"}
    assert kinds[kind or "trainjob"] in found
    assert "/workspace/runs/tiny" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheduler", "slurm", "model.n_head=3"], "did you mean `n_heads`"),
        (["--scheduler", "slurm", "--nodes", "4:3"], "launch.nnodes"),
        (["--scheduler", "slurm", "--nodes", "$(x)"], "launch.nnodes"),
        (["--scheduler", "slurm", "--partition", "a\n#SBATCH --uid=0"], "--partition"),
        (["--scheduler", "slurm", "--name", "a b"], "--name"),
        (["--scheduler", "slurm", "--run-dir", "a\nb"], "control characters"),
        (["--scheduler", "slurm", "--image", "x"], "--image: means nothing to slurm"),
        (["--scheduler", "slurm", "--gpus-per-node", "4", "launch.nproc=8"], "launch.nproc: 8"),
        ([*PODS, "--time", "60"], "--time: means nothing to kubernetes"),
        ([*PODS, "--name", "Tiny"], "--name"),
        ([*PODS, "--run-dir", "/tmp/x"], "--run-dir"),
        ([*PODS, "--run-dir", "../x"], "--run-dir"),
        ([*PODS, "--gpus-per-node", "4", "launch.nproc=8"], "launch.nproc: 8"),
        (["--scheduler", "kubernetes"], "--claim: is needed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    scheduler: Path, arguments: list[str], said: str
) -> None:
    code, out, err = mpt("submit", TINY, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not list((scheduler / "here").iterdir())
    assert not list(scheduler.glob("*.argv"))


@pytest.mark.parametrize("asked", [["--scheduler", "slurm"], PODS])
def test_without_a_scheduler_one_is_told_of_the_dry_run(
    scheduler: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = mpt("submit", TINY, *asked)
    assert (code, out) == (2, "")
    assert "--dry-run" in err
    assert not list((scheduler / "here").iterdir())


@pytest.mark.parametrize("asked", [["--scheduler", "slurm"], PODS])
def test_what_the_scheduler_says_of_a_refusal_is_passed_on(
    scheduler: Path, asked: list[str]
) -> None:
    (scheduler / "refuse").touch()
    code, out, err = mpt("submit", TINY, *asked)
    assert (code, out) == (2, "")
    assert "no such queue" in err


def test_without_gpus_asked_for_that_is_said() -> None:
    _, out, err = mpt("submit", TINY, *PODS, "--dry-run")
    assert "--gpus-per-node" in err
    assert "nvidia" not in out
    assert "nvidia" in mpt("submit", TINY, *PODS, "--dry-run", "--gpus-per-node", "1")[1]
