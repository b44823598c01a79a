"""Manifests that mean to Kubernetes what they say, whatever text goes into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.launch.kubernetes import Kind, PodJob, manifests, problems

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS: tuple[Kind, ...] = get_args(Kind)
JOB = PodJob(
    kind="job",
    name="mpt-7b",
    namespace="research",
    image="registry.example.com/mpt:0.1@sha256:0123",
    claim="runs",
    nodes=(3, 4),
    spares=1,
    gpus_per_node=8,
    recipe="# 7B.\nrun: mpt-7b\n\nseed: 17\n",
    overrides=("optimizer.lr=1e-3", "data.eval.path=$(HOME)/eval"),
    run_dir=PurePosixPath("/workspace/runs/mpt-7b"),
    grace_s=300,
    max_failures=10,
)


def documents(job: PodJob) -> dict[str, dict[str, Any]]:
    found = list(yaml.safe_load_all(manifests(job)))
    return {document["kind"]: document for document in found}


def indexed_job(job: PodJob) -> dict[str, Any]:
    """Return the spec of the batch/v1 Job that comes of it, whoever makes it."""
    found = documents(job)
    match job.kind:
        case "job":
            spec = found["Job"]["spec"]
        case "jobset":
            (replicated,) = found["JobSet"]["spec"]["replicatedJobs"]
            spec = replicated["template"]["spec"]
        case "trainjob":
            template = found["TrainingRuntime"]["spec"]["template"]
            (replicated,) = template["spec"]["replicatedJobs"]
            spec = replicated["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container(job: PodJob) -> dict[str, Any]:
    (found,) = indexed_job(job)["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def by_kubelet(word: str, environment: Mapping[str, str]) -> str:
    """Put variables into a word of a command as Kubernetes documents it."""
    parts = re.findall(r"\$\$|\$\([^)]*\)|.", word, re.DOTALL)

    def mean(part: str) -> str:
        if part == "$$":
            return "$"
        return environment.get(part[2:-1], part) if part.startswith("$(") else part

    return "".join(map(mean, parts))


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifests_are_the_golden_ones(kind: Kind) -> None:
    job = replace(JOB, kind=kind)
    assert not list(problems(job))
    golden = GOLDEN / f"submit-{kind}.yaml"
    assert manifests(job) == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_may_do_nothing_that_training_does_not_need(kind: Kind) -> None:
    pod = indexed_job(replace(JOB, kind=kind))["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (each,) = pod["containers"]
    assert each["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert {mount["name"] for mount in each["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes_mean_what_they_mean_to_mpt(kind: Kind) -> None:
    spec = indexed_job(replace(JOB, kind=kind))
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "the failure policy needs it"
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {2: "FailJob", 3: "FailJob", 4: "FailJob", 6: "FailJob", 75: "Ignore"}
    assert spec["podFailurePolicy"]["rules"][-1] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > JOB.grace_s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("nodes", "spares", "n_pods", "said", "one_is_enough"),
    [
        ((1, 1), 0, 1, "1", False),
        ((4, 4), 0, 4, "4", False),
        ((4, 4), 1, 5, "4", True),
        ((3, 4), 0, 4, "3:4", True),
    ],
)
def test_all_pods_run_the_same_command_and_meet_at_the_first(
    kind: Kind, nodes: tuple[int, int], spares: int, n_pods: int, said: str, one_is_enough: bool
) -> None:
    job = replace(JOB, kind=kind, nodes=nodes, spares=spares, overrides=("a=b",))
    spec = indexed_job(job)
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == (
        "Indexed",
        n_pods,
        n_pods,
    )
    assert ("successPolicy" in spec) == one_is_enough
    command = ["mpt", "train", "/etc/mpt/recipe.yaml", "a=b"]
    command += ["--run-dir", "/workspace/runs/mpt-7b", "--nnodes", said]
    # Pods of an indexed Job are called JOB-INDEX; JobSet calls its Jobs JOBSET-REPLICATED-INDEX.
    first = "mpt-7b-0.mpt-7b" if kind == "job" else "mpt-7b-node-0-0.mpt-7b"
    assert container(job)["command"] == command + ["--rdzv", f"{first}:29400"] * (n_pods > 1)


def test_a_plain_job_has_a_service_that_names_its_pods_before_they_are_ready() -> None:
    service, job = documents(JOB)["Service"], documents(JOB)["Job"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_a_train_job_refers_to_its_own_runtime() -> None:
    found = documents(replace(JOB, kind="trainjob"))
    reference = found["TrainJob"]["spec"]["runtimeRef"]
    runtime = found["TrainingRuntime"]
    assert reference["kind"] == runtime["kind"]
    assert reference["name"] == runtime["metadata"]["name"]
    assert reference["apiGroup"] == runtime["apiVersion"].split("/")[0]
    assert list(found)[-1] == "TrainJob", "after what it needs"
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert container(replace(JOB, kind="trainjob"))["name"] == "node"
    assert found["TrainJob"]["spec"]["trainer"]["numNodes"] == 5


# Text goes in as data, whatever it is.

TRICKY = ["yes", "on", "NULL", "~", "1e3", "0o17", "1:30", "010", "- a", "a: b", "#x", "*a", "&a"]
TEXT = st.one_of(
    st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
)


LAWS = settings(max_examples=50, deadline=None, derandomize=True)


@LAWS
@given(recipe=TEXT, overrides=st.lists(TEXT | st.just("a=$(HOME) $$(HOME) $HOME"), max_size=3))
def test_recipe_and_overrides_arrive_as_they_were_written(
    recipe: str, overrides: list[str]
) -> None:
    job = replace(JOB, recipe=f"{recipe}\n  {recipe} \n", overrides=tuple(overrides))
    assert documents(job)["ConfigMap"]["data"] == {"recipe.yaml": job.recipe}
    command = container(job)["command"]
    arrived = [by_kubelet(word, {"HOME": "/evil", "USER": "x"}) for word in command]
    assert arrived[3 : 3 + len(overrides)] == overrides


@LAWS
@given(text=TEXT)
def test_every_text_is_quoted_or_a_plain_word(text: str) -> None:
    job = replace(JOB, overrides=(text,))
    words = [line.strip() for line in manifests(job).split("\n")]
    written = words[words.index("- mpt") + 3].removeprefix("- ")
    assert written.startswith('"') or re.fullmatch(r"[A-Za-z-]+", written)
    assert written.lower() not in {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("name", value) for value in ("", "A", "a_b", "a.b", "-a", "a-", "7b", "a" * 41, "a\n")),
        *(("namespace", value) for value in ("", "A b", "a/b", "a\n")),
        *(("claim", value) for value in ("", "../x", "a b", "a\n")),
        *(("image", value) for value in ("", "-x", "a b", "a\n", "$(x)")),
        *(("run_dir", PurePosixPath(v)) for v in ("/tmp/x", "/workspace/../etc", "/workspaces")),
        ("recipe", "#" * 200_001),
    ],
)
def test_what_kubernetes_would_refuse_or_lose_is_refused(option: str, value: Any) -> None:
    assert len(list(problems(replace(JOB, **{option: value})))) == 1
