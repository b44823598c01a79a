"""Laws of the loader: a batch is the same samples on any ranks, in microbatches of one shape."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt.data.dataset import open_dataset
from mpt.data.loader import Loader, eval_batches
from mpt.errors import DataError
from mpt.ledger import Ledger, RolledBack
from mpt.recipe.data import Data, Stream
from mpt.recipe.model import Model
from mpt.state import IGNORE, Microbatch
from tests.data.cases import small_model, write_dataset

CPU = torch.device("cpu")
LENGTH = 4
MODEL = small_model(LENGTH, vocab_size=1000)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Two streams whose first tokens are 0, 4, 8, ... and 500, 504, ..."""
    for name, start, count in (("a", 0, 40), ("b", 500, 15)):
        samples = start + np.arange(count * LENGTH).reshape(count, LENGTH)
        write_dataset(tmp_path / name, samples)
    return Data(
        streams={
            "a": Stream(path=f"{tmp_path}/a", weight=3.0),
            "b": Stream(path=f"{tmp_path}/b"),
        }
    )


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def loader_for(
    data: Data,
    *,
    global_batch_size: int = 10,
    microbatch_size: int = 3,
    rank: int = 0,
    world_size: int = 1,
    model: Model = MODEL,
    eod_id: int | None = None,
    following: Callable[[int], int] | None = None,
) -> Loader:
    return Loader(
        data,
        model,
        seed=17,
        global_batch_size=global_batch_size,
        microbatch_size=microbatch_size,
        rank=rank,
        world_size=world_size,
        device=CPU,
        eod_id=eod_id,
        following=following,
    )


def real_rows(microbatches: list[Microbatch]) -> Tensor:
    """The samples that take a loss, (n, LENGTH)."""
    tokens = torch.cat([m.tokens for m in microbatches])
    targets = torch.cat([m.targets for m in microbatches])
    real = (targets != IGNORE).any(dim=1)
    assert (tokens[~real] == 0).all()
    return tokens[real]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 10, 13])
@pytest.mark.parametrize("microbatch_size", [1, 3, 16])
def test_ranks_together_read_the_batch_whatever_their_number(
    data: Data, world_size: int, microbatch_size: int
) -> None:
    with loader_for(data) as alone:
        wanted = [real_rows(alone.next(start)) for start in (0, 10, 20)]
    seen: list[list[Tensor]] = [[], [], []]
    shapes = set()
    for rank in range(world_size):
        with loader_for(
            data, rank=rank, world_size=world_size, microbatch_size=microbatch_size
        ) as loader:
            for step in range(3):
                microbatches = loader.next(10 * step)
                shapes.add((len(microbatches), *{m.tokens.shape for m in microbatches}))
                assert {m.targets.shape for m in microbatches} == {(microbatch_size, LENGTH)}
                seen[step].append(real_rows(microbatches))
    assert len(shapes) == 1
    assert shapes.pop()[0] == math.ceil(math.ceil(10 / world_size) / microbatch_size)
    for ours, whole in zip(seen, wanted, strict=True):
        assert len(whole) == 10
        # No two samples are alike. Who reads which follows their shards, not their positions.
        assert sorted(torch.cat(ours).tolist()) == sorted(whole.tolist())


def test_targets_are_the_next_tokens_and_the_last_has_none(data: Data) -> None:
    with loader_for(data) as loader:
        *_, last = microbatches = loader.next(0)
    assert len(microbatches) == 4
    for m in microbatches[:3]:
        assert m.tokens.dtype == m.targets.dtype == torch.int64
        assert torch.equal(m.targets[:, :-1], m.tokens[:, 1:])
        assert (m.targets[:, -1] == IGNORE).all()
    assert (last.targets[1:] == IGNORE).all()
    assert (last.tokens[1:] == 0).all()


def test_a_batch_does_not_depend_on_those_asked_for_before(data: Data) -> None:
    with loader_for(data) as loader:
        in_order = [real_rows(loader.next(start)) for start in range(0, 80, 10)]
        for start in (70, 0, 30, 30, 1000, 10):
            again = real_rows(loader.next(start))
            assert start >= 80 or torch.equal(again, in_order[start // 10])
    with loader_for(data) as resumed:
        assert torch.equal(real_rows(resumed.next(50)), in_order[5])


def test_a_batch_may_begin_at_any_position(data: Data) -> None:
    with loader_for(data) as loader:
        whole = torch.cat([real_rows(loader.next(start)) for start in (0, 10)])
        assert torch.equal(real_rows(loader.next(7)), whole[7:17])


def test_what_is_read_ahead_is_what_comes_next_not_what_is_passed_over(data: Data) -> None:
    ledger = Ledger((RolledBack(1, 10, 30, "bad"),))
    asked = []

    def following(position: int) -> int:
        asked.append(ledger.position(position + 10))
        return asked[-1]

    with loader_for(data) as plain, loader_for(data, following=following) as loader:
        loader.next(0)
        assert asked == [30, 40]
        assert torch.equal(real_rows(loader.next(30)), real_rows(plain.next(30)))


def test_streams_are_mixed_by_weight_and_named_order_does_not_matter(data: Data) -> None:
    with loader_for(data) as loader:
        rows = torch.cat([real_rows(loader.next(start)) for start in range(0, 400, 10)])
    assert (rows[:, 0] >= 500).sum() == 100  # a quarter of 400
    turned = Data(streams=dict(reversed(data.streams.items())))
    with loader_for(turned) as loader:
        assert torch.equal(real_rows(loader.next(30)), rows[30:40])


def test_an_epoch_reads_every_sample_once(data: Data) -> None:
    only = Data(streams={"a": data.streams["a"]})
    with loader_for(only) as loader:
        rows = torch.cat([real_rows(loader.next(start)) for start in range(0, 40, 10)])
        again = torch.cat([real_rows(loader.next(start)) for start in range(40, 80, 10)])
    assert sorted(rows[:, 0].tolist()) == list(range(0, 160, 4))
    assert sorted(again[:, 0].tolist()) == list(range(0, 160, 4))
    assert not torch.equal(rows, again)


def test_a_token_outside_the_vocabulary_is_named_with_stream_shard_and_row(data: Data) -> None:
    words = r"b: .*b/shard\.0000[0-2]\.mds: row \d+: token id 5\d\d is outside .* 500\."
    with (
        loader_for(data, model=small_model(LENGTH, vocab_size=500)) as loader,
        pytest.raises(DataError, match=words),
    ):
        loader.next(0)


def test_a_negative_token_is_outside_the_vocabulary_too(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", np.array([[1, -2, 3, 4]]), dtype="int16")
    batches = eval_batches(
        open_dataset(tmp_path / "x"),
        MODEL,
        samples=None,
        microbatch_size=1,
        rank=0,
        world_size=1,
        device=CPU,
    )
    with pytest.raises(DataError, match="row 0: token id -2 is outside"):
        next(batches)


def test_an_error_while_reading_ahead_surfaces_in_the_batch_it_belongs_to(
    data: Data, tmp_path: Path
) -> None:
    with loader_for(Data(streams={"a": data.streams["a"]}, shuffle=False)) as loader:
        (tmp_path / "a" / "shard.00004.mds").unlink()  # samples 28 to 34
        loader.next(0)
        loader.next(10)
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard\.00004\.mds: cannot be read"):
                loader.next(20)


def test_what_does_not_fit_the_model_is_refused_before_the_first_step(data: Data) -> None:
    with pytest.raises(DataError, match=r"samples of 4 tokens, but model\.max_seq_len is 8"):
        loader_for(data, model=small_model(8))
    with pytest.raises(DataError, match=r"it has no index\.json"):
        loader_for(Data(streams={"x": Stream(path="/nowhere")}))


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("samples", [None, 1, 7, 15, 99])
def test_ranks_together_evaluate_the_first_samples_in_file_order(
    data: Data, world_size: int, samples: int | None
) -> None:
    batches = [
        list(
            eval_batches(
                open_dataset(data.streams["b"].path),
                MODEL,
                samples=samples,
                microbatch_size=2,
                rank=rank,
                world_size=world_size,
                device=CPU,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert {m.tokens.shape for of_rank in batches for m in of_rank} == {(2, LENGTH)}
    rows = torch.cat([real_rows(of_rank) for of_rank in batches])
    n = min(samples or 15, 15)
    assert rows[:, 0].tolist() == [500 + LENGTH * i for i in range(n)]


def test_a_document_ends_with_its_last_token(tmp_path: Path) -> None:
    samples = np.array([[5, 9, 6, 7], [9, 9, 5, 9], [1, 2, 3, 4]])
    expected = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2], [0, 0, 0, 0]])
    write_dataset(tmp_path / "a", samples)
    data = Data(streams={"a": Stream(path=f"{tmp_path}/a")}, shuffle=False)
    with loader_for(data, global_batch_size=3, microbatch_size=2, eod_id=9) as loader:
        found = loader.next(0)
    held_out = eval_batches(
        open_dataset(tmp_path / "a"),
        MODEL,
        samples=None,
        microbatch_size=2,
        rank=0,
        world_size=1,
        device=CPU,
        eod_id=9,
    )
    for batches in (found, list(held_out)):
        documents = [b.documents for b in batches if b.documents is not None]
        assert torch.equal(torch.cat(documents)[:3], expected)


def test_documents_are_not_told_apart_unless_somebody_asks(data: Data) -> None:
    with loader_for(data) as loader:
        assert all(microbatch.documents is None for microbatch in loader.next(0))
