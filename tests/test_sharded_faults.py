"""Faults of tables that several workers share, each of them silent elsewhere: any number of workers is one plain torch table."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, PolicyConfig
from fiited_ray.data import Batch
from fiited_ray.embedding import ShardedEmbedding
from fiited_ray.store import ShardSpec, VhpiShard
from fiited_ray.store.reference import initial_values, key_of

IDS, ROWS, STEPS, DIM, LR = 11, 13, 6, 12, 0.1  # few ids: they meet again within a bag, a batch and between workers
DATA = DataConfig(multi_hot=("a", "b", "c"), shared_tables={"ab": ("a", "b")})
Bags = list[list[list[int]]]  # ids by feature and row


class Threads:
    """An exchange among threads of this process."""

    def __init__(self, rank: int, places: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.workers, self.bytes_sent = rank, len(places), 0
        self._places, self._barrier = places, barrier

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        got = torch.cat([place[self.rank] for place in self._shown(list(rows.split(send)))])
        assert len(got) == sum(receive)
        return got

    def all_to_all_with(
        self, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        parts = [place[self.rank] for place in self._shown(list(more.split(send_more)))]
        return self.all_to_all(rows, send, receive), torch.cat(parts), [len(part) for part in parts]

    def all_reduce(self, values: Tensor) -> Tensor:
        return torch.stack([place[0] for place in self._shown([values])]).sum(0)

    def _shown(self, mine: list[Tensor]) -> list[list[Tensor]]:
        self._places[self.rank] = mine
        self._barrier.wait()
        shown = list(self._places)
        self._barrier.wait()
        return shown


def step_of(number: int) -> tuple[Bags, Tensor]:
    """A global batch, with empty bags and repeated ids, and the gradient [ROWS, F, DIM] of its vectors."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(0, 4, (len(DATA.features), ROWS), generator=generator)
    bags = [[torch.randint(0, IDS, (int(n),), generator=generator).tolist() for n in feature] for feature in lengths]
    return bags, torch.randn(ROWS, len(DATA.features), DIM, generator=generator)


def batch_of(bags: Bags) -> Batch:
    flat = [bag for feature in bags for bag in feature]
    offsets = torch.tensor([0, *(len(bag) for bag in flat)]).cumsum(0)
    rows = len(bags[0])
    return Batch(torch.zeros(rows, 0), torch.zeros(rows), torch.tensor([each for bag in flat for each in bag], dtype=torch.int64), offsets)


@cache
def sharded(
    workers: int, mean: bool, optimizer: str, kind: str = "frequency"
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], float]]:
    """Train; vectors and importance by (table, id)."""
    config = Config(
        data=DATA,
        embedding=EmbeddingConfig(dim=DIM, chunk=4, optimizer=optimizer, init_scale=0.1),
        policy=PolicyConfig(importance=kind, decay=1.0),
    )
    shards = [VhpiShard(ShardSpec.of(config, None, rank, workers)) for rank in range(workers)]
    places, barrier = [[] for _ in range(workers)], threading.Barrier(workers, timeout=60)

    def work(rank: int) -> None:
        module = ShardedEmbedding(shards[rank], Threads(rank, places, barrier), DATA.feature_tables, LR, mean)
        begin, end = rank * ROWS // workers, (rank + 1) * ROWS // workers
        for number in range(STEPS):
            bags, gradient = step_of(number)
            vectors = module(batch_of([feature[begin:end] for feature in bags]))
            (vectors * gradient[begin:end]).sum().backward()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    vectors, importance = {}, {}
    for shard in shards:
        rows = shard.export_rows()
        keys = list(zip(rows.tables.tolist(), rows.raw_ids.tolist(), strict=True))
        assert not vectors.keys() & set(keys)  # an id is in one shard only
        vectors |= dict(zip(keys, rows.values.reshape(-1, DIM), strict=True))
        importance |= dict(zip(keys, rows.importance.tolist(), strict=True))
    return vectors, importance


def in_plain_torch(mean: bool, optimizer: str) -> Tensor:
    """float32 [tables, IDS, DIM]: the same training on ordinary tables."""
    start = [[initial_values(key_of(raw_id, table, 0), table, 0, DIM, 0.1) for raw_id in range(IDS)] for table in range(2)]
    tables = [torch.nn.Parameter(torch.tensor([list(map(float, row)) for row in table])) for table in start]
    learner = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer](tables, lr=LR)
    for number in range(STEPS):
        bags, gradient = step_of(number)
        loss = torch.zeros(())
        for feature, table in enumerate(DATA.feature_tables):
            batch = batch_of([bags[feature]])
            pooled = embedding_bag(batch.ids, tables[table], batch.offsets[:-1], mode="mean" if mean else "sum")
            loss = loss + (pooled * gradient[:, feature]).sum()
        learner.zero_grad()
        loss.backward()
        learner.step()
    return torch.stack([table.detach() for table in tables])


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_repeated_ids_and_shared_tables_learn_as_in_plain_torch_on_any_number_of_workers(workers: int, mean: bool, optimizer: str) -> None:
    vectors, _ = sharded(workers, mean, optimizer)
    expected = in_plain_torch(mean, optimizer)
    assert len(vectors) == 2 * IDS
    for (table, raw_id), vector in vectors.items():
        torch.testing.assert_close(vector, expected[table, raw_id], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_frequency_is_summed_over_both_deduplications(workers: int) -> None:
    _, importance = sharded(workers, False, "sgd")
    expected = dict.fromkeys(importance, 0.0)
    for number in range(STEPS):
        for feature, rows in enumerate(step_of(number)[0]):
            for raw_id in (each for bag in rows for each in bag):
                expected[DATA.feature_tables[feature], raw_id] += 1
    assert importance == expected


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_the_norms_of_lookups_are_summed_over_workers(workers: int, mean: bool) -> None:
    _, importance = sharded(workers, mean, "sgd", "lookup_norm_sum")
    expected = dict.fromkeys(importance, 0.0)
    for number in range(STEPS):
        bags, gradient = step_of(number)
        for feature, rows in enumerate(bags):
            for row, bag in enumerate(rows):
                for raw_id in bag:
                    expected[DATA.feature_tables[feature], raw_id] += float(gradient[row, feature].norm()) / (len(bag) if mean else 1)
    assert importance == pytest.approx(expected, rel=1e-5)
