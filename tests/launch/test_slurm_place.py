"""Where a node is among those of a Slurm job, from the variables that srun sets."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.errors import UsageError
from mpt.launch.slurm import Cluster, cluster_from_slurm, expand

UNDER_SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURMD_NODENAME": "gpu008",
}


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_a_shell_in_an_allocation_is_no_cluster(missing: str) -> None:
    assert cluster_from_slurm(UNDER_SRUN) == Cluster(2, "gpu008", "gpu007", 24567)
    assert cluster_from_slurm({k: v for k, v in UNDER_SRUN.items() if k != missing}) is None
    assert cluster_from_slurm({}) is None


def test_one_node_is_no_cluster() -> None:
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert cluster_from_slurm({**UNDER_SRUN, **one}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node=1"),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"}, "--ntasks-per-node=1"),
        ({"SLURM_STEP_NUM_NODES": "two"}, "SLURM_STEP_NUM_NODES"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
        ({"SLURMD_NODENAME": ""}, "SLURMD_NODENAME"),
        ({"SLURM_STEP_NODELIST": "gpu[1"}, "not a list of nodes"),
    ],
)
def test_odd_variables_are_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cluster_from_slurm({**UNDER_SRUN, **changes})


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("login1", ["login1"]),
        ("a,b", ["a", "b"]),
        ("gpu[001-003,7],login1", ["gpu001", "gpu002", "gpu003", "gpu7", "login1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[099-101]x", ["n099x", "n100x", "n101x"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_a_node_list_is_spelled_out(nodes: str, names: list[str]) -> None:
    assert list(expand(nodes)) == names


@pytest.mark.parametrize(
    "nodes", ["", ",", "a,", "a[", "a]", "a[]", "a[1-]", "a[x]", "a[2-1]", "a b", "a[[1]]", "a\n"]
)
def test_what_is_no_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(UsageError, match="not a"):
        list(expand(nodes))


def test_the_first_of_very_many_nodes_comes_at_once() -> None:
    assert list(islice(expand("n[1-999999999],m"), 2)) == ["n1", "n2"]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 99999), min_size=1, max_size=5), st.integers(1, 5))
def test_a_list_of_numbers_is_read_as_wide_as_it_is_written(numbers: list[int], width: int) -> None:
    written = [f"{number:0{width}}" for number in numbers]
    assert list(expand(f"n[{','.join(written)}]")) == [f"n{text}" for text in written]
