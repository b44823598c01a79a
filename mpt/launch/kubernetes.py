"""Kubernetes: the manifests of a job that trains a recipe, as a TrainJob, a JobSet or a Job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from mpt import errors

Kind = Literal["trainjob", "jobset", "job"]
Manifest = dict[str, Any]

SHARED = PurePosixPath("/workspace")
"""Where the volume claim is mounted in each pod, and where relative paths of the recipe begin."""

RENDEZVOUS_PORT = 29400
MARGIN_S = 60
"""After the last worker has saved or was killed, until the kubelet kills what is left."""

VERDICTS = [
    errors.EXIT_USAGE,
    errors.EXIT_DATA,
    errors.EXIT_CHECKPOINT,
    errors.EXIT_DIVERGED,
]
"""Exit codes after which the same again would end the same. That too few nodes came is none."""

MOST_RECIPE_BYTES = 200_000
"""`kubectl apply` keeps a copy in an annotation, which may have 256 KiB."""

_CONTAINER = "node"  # the name that Kubeflow Trainer gives meaning to
_RECIPE_DIR = "/etc/mpt"
_USER = 1000
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""An RFC 1035 label, with room for what is appended for services and pods."""
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,499}")


@dataclass(frozen=True, kw_only=True)
class PodJob:
    """What the cluster is asked for."""

    kind: Kind
    name: str
    namespace: str | None
    image: str
    claim: str
    """A PersistentVolumeClaim that all pods can write: run directory and data lie there."""
    nodes: tuple[int, int]
    """The fewest and the most pods that train together."""
    spares: int = 0
    """Pods more that stand by."""
    gpus_per_node: int | None = None
    recipe: str
    """Its text."""
    overrides: tuple[str, ...]
    run_dir: PurePosixPath
    grace_s: int
    """What workers have to finish a step and save."""
    max_failures: int
    """Pods that may fail for no reason that is known before the job does."""


def problems(job: PodJob) -> Iterator[str]:
    """Yield why a job cannot be written as manifests."""
    if not _LABEL.fullmatch(job.name):
        yield (
            f"--name: {job.name!r} is not a name for services and pods: at most 40 lower-case "
            "letters, digits and '-', first a letter."
        )
    if job.namespace is not None and not _OBJECT.fullmatch(job.namespace):
        yield f"--namespace: {job.namespace!r} is not the name of a namespace."
    if not _OBJECT.fullmatch(job.claim):
        yield f"--claim: {job.claim!r} is not the name of a PersistentVolumeClaim."
    if not _IMAGE.fullmatch(job.image):
        yield f"--image: {job.image!r} is not the name of an image."
    if not job.run_dir.is_relative_to(SHARED) or ".." in job.run_dir.parts:
        yield f"--run-dir: {job.run_dir} would be lost with its pod; use a path below {SHARED}."
    if (size := len(job.recipe.encode())) > MOST_RECIPE_BYTES:
        yield f"the recipe has {size:,} bytes; a ConfigMap takes {MOST_RECIPE_BYTES:,}."


def manifests(job: PodJob) -> str:
    """Return the manifests as YAML documents; `problems` has found none."""
    config: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, f"{job.name}-recipe"),
        "data": {"recipe.yaml": job.recipe},
    }
    *needed, workload = _workload(job)
    return yaml.dump_all(
        [*needed, config, workload],
        Dumper=_Dumper,
        sort_keys=False,
        width=1 << 20,  # a folded line is hard to read
        explicit_start=True,
    )


def _workload(job: PodJob) -> list[Manifest]:
    match job.kind:
        case "job":
            return _plain_job(job)
        case "jobset":
            version = "jobset.x-k8s.io/v1alpha2"
            return [_object(job, version, "JobSet", _jobset(job, {}))]
        case "trainjob":
            return _train_job(job)


def _train_job(job: PodJob) -> list[Manifest]:
    """Return a TrainJob and the runtime it refers to.

    The runtime is its own, and not the cluster's torch-distributed: what a TrainJob may change of
    that one was renamed between releases, and never were failure policy, grace and security part
    of it. Nothing of torchrun is needed from it either.
    """
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = _jobset(job, {"metadata": {"labels": labels}})
    version = "trainer.kubeflow.org/v1alpha1"
    template = {"mlPolicy": {"numNodes": _n_pods(job)}, "template": {"spec": spec}}
    reference = {"apiGroup": version.split("/")[0], "kind": "TrainingRuntime", "name": job.name}
    train = {"runtimeRef": reference, "trainer": {"numNodes": _n_pods(job)}}
    return [
        _object(job, version, "TrainingRuntime", template),
        _object(job, version, "TrainJob", train),
    ]


def _jobset(job: PodJob, about: Manifest) -> Manifest:
    first_host = f"{job.name}-{_CONTAINER}-0-0.{job.name}"
    replicated = {
        "name": _CONTAINER,
        "replicas": 1,
        "template": {**about, "spec": _job_spec(job, first_host)},
    }
    return {"network": {"enableDNSHostnames": True}, "replicatedJobs": [replicated]}


def _plain_job(job: PodJob) -> list[Manifest]:
    """Return an indexed Job, and the service that gives its pods names."""
    service = {
        "clusterIP": "None",
        # Pods must find each other before they are ready, and while one of them is not.
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": job.name},
        "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
    }
    spec = _job_spec(job, f"{job.name}-0.{job.name}")
    spec["template"]["spec"]["subdomain"] = job.name
    return [_object(job, "v1", "Service", service), _object(job, "batch/v1", "Job", spec)]


def _job_spec(job: PodJob, first_host: str) -> Manifest:
    """Return an indexed Job's: pods come again unless they have said that it is of no use."""
    n_pods = _n_pods(job)
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": n_pods,
        "parallelism": n_pods,
        "backoffLimit": job.max_failures,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_codes(VERDICTS)},
                {"action": "Ignore", "onExitCodes": _exit_codes([errors.EXIT_PREEMPTED])},
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
    }
    if n_pods > job.nodes[0]:
        # One that is done says that the run is; a spare that never got a place must not hold it up.
        spec["successPolicy"] = {"rules": [{"succeededCount": 1}]}
    return {**spec, "template": {"spec": _pod_spec(job, first_host)}}


def _exit_codes(codes: list[int]) -> Manifest:
    return {"containerName": _CONTAINER, "operator": "In", "values": codes}


def _pod_spec(job: PodJob, first_host: str) -> Manifest:
    """Return a pod's, fit for the Pod Security Standard `restricted`."""
    mounts = {"shared": str(SHARED), "recipe": _RECIPE_DIR, "shm": "/dev/shm"}
    container: Manifest = {
        "name": _CONTAINER,
        "image": job.image,
        "command": [_literal(word) for word in _command(job, first_host)],
        "workingDir": str(SHARED),
        # A user that the image does not know has no home, and torch asks for its name.
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "USER", "value": "mpt"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }
    spec: Manifest = {
        "restartPolicy": "Never",  # the failure policy asks for it; a new pod comes instead
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.grace_s + MARGIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL's, between GPUs of a node
        ],
    }
    if job.gpus_per_node is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus_per_node}}
        toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        spec["tolerations"] = [toleration]
    return spec


def _command(job: PodJob, first_host: str) -> list[str]:
    fewest, most = job.nodes
    nnodes = f"{most}" if fewest == most else f"{fewest}:{most}"
    command = ["mpt", "train", f"{_RECIPE_DIR}/recipe.yaml", *job.overrides]
    command += ["--run-dir", str(job.run_dir), "--nnodes", nnodes]
    return command + ["--rdzv", f"{first_host}:{RENDEZVOUS_PORT}"] * (_n_pods(job) > 1)


def _literal(word: str) -> str:
    """Return a word of a command so that the kubelet puts no variable into it."""
    return word.replace("$", "$$")


def _n_pods(job: PodJob) -> int:
    return job.nodes[1] + job.spares


def _object(job: PodJob, version: str, kind: str, spec: Manifest) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": _metadata(job), "spec": spec}


def _metadata(job: PodJob, name: str | None = None) -> Manifest:
    namespace = {} if job.namespace is None else {"namespace": job.namespace}
    return {"name": name or job.name, **namespace}


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, with quotes around all but the plainest words.

    What a text without quotes means differs between YAML 1.1, 1.2 and the parsers of kubectl.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[a-z][a-z-]*", re.IGNORECASE)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
