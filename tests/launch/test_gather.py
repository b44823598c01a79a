"""Laws of gathering: who is waited for and how long, who trains, and as which ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.launch.gather import CLEAR_S, LAST_CALL_S, Gathering, TooFewNodes
from mpt.launch.group import Member, assign, choose
from mpt.recipe.launch import Launch

JOIN_S = 100.0


def ready(*names: str, nproc: int = 2) -> list[Member]:
    return [Member(name, f"host-{name}", 0.0, nproc, port) for port, name in enumerate(names, 1)]


def busy(*names: str) -> list[Member]:
    """Return nodes that are there and have workers of an earlier attempt to get rid of."""
    return [Member(name, f"host-{name}", 0.0, 2) for name in names]


def gathering(nnodes: int | str, *, again: bool = False, join_s: float = JOIN_S) -> Gathering:
    return Gathering(Launch(nnodes=nnodes, join_s=join_s), since=0.0, again=again)


def names(members: list[Member]) -> list[str]:
    return [member.name for member in members]


def test_an_attempt_begins_at_once_when_all_that_may_train_are_ready() -> None:
    assert gathering(2).ready(ready("a"), 0.0) == []
    assert names(gathering(2).ready(ready("a", "b"), 0.0)) == ["a", "b"]
    assert names(gathering(2).ready(ready("a", "b", "c"), 0.0)) == ["a", "b", "c"]


def test_with_enough_but_not_all_there_is_one_last_call() -> None:
    waiting = gathering("1:3")
    assert waiting.ready(ready("a"), 1.0) == []
    assert waiting.ready(ready("a"), 1.0 + LAST_CALL_S - 0.1) == []
    assert names(waiting.ready(ready("a"), 1.0 + LAST_CALL_S)) == ["a"]


def test_the_last_call_begins_anew_when_there_were_too_few_in_between() -> None:
    waiting = gathering("2:3")
    assert waiting.ready(ready("a", "b"), 0.0) == []
    assert waiting.ready(ready("a"), 4.0) == []
    assert waiting.ready(ready("a", "b"), LAST_CALL_S) == []
    assert waiting.ready(ready("a", "b"), 2 * LAST_CALL_S)


def test_after_a_fault_those_that_are_left_go_on_without_a_call() -> None:
    assert names(gathering("1:3", again=True).ready(ready("a"), 0.0)) == ["a"]
    assert gathering(2, again=True).ready(ready("a"), 0.0) == [], "not with fewer than it needs"


def test_who_is_there_but_not_ready_is_waited_for_and_not_for_ever() -> None:
    waiting = gathering("1:2", again=True)
    there = [*ready("a"), *busy("b")]
    assert waiting.ready(there, CLEAR_S - 0.1) == []
    assert names(waiting.ready(there, CLEAR_S)) == ["a"]


def test_nothing_begins_before_its_time() -> None:
    waiting = gathering(1, again=True)
    waiting.not_before = 10.0
    assert waiting.ready(ready("a"), 9.9) == []
    assert waiting.ready(ready("a"), 10.0)


@pytest.mark.parametrize("join_s", [0.0, 3.0, JOIN_S])
@pytest.mark.parametrize("again", [False, True])
def test_too_few_are_waited_for_as_long_as_the_recipe_says(join_s: float, again: bool) -> None:
    waiting = gathering("2:3", again=again, join_s=join_s)
    assert waiting.ready(ready("a"), join_s) == []
    with pytest.raises(TooFewNodes, match=rf"^1 nodes .*join_s {join_s:g}, .* 2:3 needs 2$"):
        waiting.ready(ready("a"), join_s + 0.1)


def test_nodes_that_are_only_clearing_up_are_not_too_few() -> None:
    waiting = gathering(2, again=True, join_s=1.0)
    assert waiting.ready(busy("a", "b"), CLEAR_S - 0.1) == []
    with pytest.raises(TooFewNodes):
        waiting.ready(busy("a", "b"), CLEAR_S)


def test_a_bad_node_trains_only_if_there_are_not_enough_without_it() -> None:
    there = ready("bad", "b", "c")
    assert names(choose(there, [], {"bad"}, fewest=2, most=2)) == ["b", "c"]
    assert names(choose(there[:2], [], {"bad"}, fewest=2, most=2)) == ["b", "bad"]
    assert names(choose(there[:2], [], {"bad"}, fewest=1, most=2)) == ["b"]
    assert names(choose(there[:1], [], {"bad"}, fewest=1, most=1)) == ["bad"]


def test_a_spare_takes_the_place_that_a_lost_node_leaves() -> None:
    last = ["a", "b", "c"]
    chosen = choose(ready("spare", "c", "a"), last, (), fewest=3, most=3)
    assert names(chosen) == ["a", "spare", "c"]


def test_ranks_keep_their_places_however_the_nodes_come_back() -> None:
    last = ["c", "a", "b"]
    assert names(choose(ready("a", "b", "spare", "c"), last, (), fewest=3, most=3)) == last


nodes = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1)


@given(nodes, nodes, st.sets(st.sampled_from("abcdef")), st.integers(1, 4), st.integers(0, 3))
def test_whoever_is_chosen_is_ready_and_fits(
    there: list[str], last: list[str], bad: set[str], fewest: int, more: int
) -> None:
    most = fewest + more
    chosen = names(choose(ready(*there), last, bad, fewest=fewest, most=most))
    assert set(chosen) <= set(there)
    assert len(chosen) == len(set(chosen)) <= most
    if len(there) >= fewest:
        assert len(chosen) >= fewest
        good = [name for name in there if name not in bad]
        assert not set(chosen) & bad or len(good) < fewest
    stayed = [name for name in chosen if name in last]
    assert stayed == sorted(stayed, key=last.index)
    if len(chosen) >= len(last):
        assert all(chosen.index(name) == last.index(name) for name in stayed)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_ranks_are_counted_through_node_after_node(nprocs: list[int]) -> None:
    members = [
        Member(f"node-{i}", f"host-{i}", 0.0, nproc, 5000 + i) for i, nproc in enumerate(nprocs)
    ]
    parts = assign(7, members)
    ranks = [
        int(part.environment(local_rank)["RANK"])
        for part in parts
        for local_rank in range(part.nproc)
    ]
    assert ranks == list(range(sum(nprocs)))
    assert [part.node_rank for part in parts] == list(range(len(nprocs)))
    assert {part.attempt for part in parts} == {7}
    assert {part.world_size for part in parts} == {sum(nprocs)}
    for one, other in pairwise(parts):
        assert (one.store_host, one.store_port) == (other.store_host, other.store_port)
    assert (parts[0].store_host, parts[0].store_port) == ("host-0", 5000), "where rank 0 is"
