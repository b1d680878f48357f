"""Rounds of several workers, here threads: what is reported of them, and that they do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, ModelConfig, PolicyConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.policy import BINS, Decision, RoundState, ShardReport, decide
from fiited_ray.store import ops
from fiited_ray.train.loop import Worker
from fiited_ray.train.rounds import gather_reports, hold_round

WORKERS = 3
BUDGET = 3_000_000


class ThreadExchange:
    """Sums among threads."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.workers, self.bytes_sent = rank, len(said), 0
        self.said, self.barrier = said, barrier

    def all_reduce(self, values: Tensor) -> Tensor:
        self.said[self.rank] = values
        self.barrier.wait(30)
        total = torch.stack(self.said).sum(0, dtype=values.dtype)
        self.barrier.wait(30)
        return total

    def another(self) -> ThreadExchange:
        return self


def on_each(work: Callable[[ThreadExchange], Any]) -> list[Any]:
    ops.host_ops()  # loaded once, before there are threads
    said, barrier = [None] * WORKERS, threading.Barrier(WORKERS)

    def on_one(rank: int) -> Any:
        try:
            return work(ThreadExchange(rank, said, barrier))
        except Exception as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(on_one, range(WORKERS)))
    errors = [each for each in results if isinstance(each, Exception)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


def report(rank: int, ceiling: int | None) -> ShardReport:
    rows = np.random.default_rng(rank).integers(0, 50, BINS)
    return ShardReport(np.stack([rows, rows * 90]), 10_000 + rank, 70 * rank, 3 * rank, ceiling)


def same(a: ShardReport, b: ShardReport) -> bool:
    mine, theirs = ({name: value for name, value in vars(each).items() if name != "histogram"} for each in (a, b))
    return mine == theirs and np.array_equal(a.histogram, b.histogram)


def test_reports_of_shards_without_ceilings_are_added_on_their_way() -> None:
    own = [report(rank, None) for rank in range(WORKERS)]
    total = ShardReport(sum(each.histogram for each in own), 30_003, 210, 9, None, WORKERS)
    for reports in on_each(lambda exchange: gather_reports(own[exchange.rank], exchange)):
        assert len(reports) == 1
        assert same(reports[0], total)


def test_shards_with_ceilings_are_reported_one_by_one() -> None:
    own = [report(rank, 500_000) for rank in range(WORKERS)]
    for reports in on_each(lambda exchange: gather_reports(own[exchange.rank], exchange)):
        assert len(reports) == WORKERS
        assert all(map(same, reports, own))


@pytest.mark.parametrize("budget", [None, 5_000_000])
def test_the_sum_is_decided_as_the_single_reports_are(budget: int | None) -> None:
    own = [report(rank, None) for rank in range(WORKERS)]
    together = on_each(lambda exchange: gather_reports(own[exchange.rank], exchange))[0]
    state = RoundState(budget, 0.0, (1.0, 4.0), (0, 60, 100))
    one, three = decide(together, state, PolicyConfig()), decide(own, state, PolicyConfig())
    assert set(three.thresholds) == {one.threshold} == set(one.thresholds)
    assert (one.planned_bytes, one.changed_bytes, one.skipped) == (three.planned_bytes, three.changed_bytes, three.skipped)


class Faltering:
    """A coordinator that gives no answer at first."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.decider, self.asked = LocalDecider(policy), 0

    def decide(self, step: int, reports: Sequence[ShardReport], state: RoundState) -> Decision | None:
        self.asked += 1
        return None if self.asked == 1 else self.decider.decide(step, reports, state)


def workers_with_rows(exchange: ThreadExchange, ceiling: int | None, uneven: bool = False) -> Worker:
    config = Config(
        data=DataConfig(train=("none",), dense=("d",), categorical=("c",)),
        embedding=EmbeddingConfig(dim=32, chunk=8),
        policy=PolicyConfig(max_shard_bytes=ceiling),
        model=ModelConfig(bottom=(4,), top=(4,)),
        train=TrainConfig(workers=WORKERS),
    )
    worker = Worker(config, BUDGET, exchange, Faltering(config.policy))
    ids = torch.arange(WORKERS * 10_000)
    of_all = ops.dedup_ids(ids, torch.tensor([len(ids)]), torch.zeros(1, dtype=torch.int32), worker.spec.seed, WORKERS)
    rows = 3000 * (exchange.rank + 1) if uneven else 6000
    mine = slice(begin := int(of_all.splits[: exchange.rank].sum()), begin + rows)
    keys, tables, counts = of_all.keys[mine], of_all.tables[mine], of_all.counts[mine]
    worker.shard.set_limit(2**31)  # as if loaded from fewer workers
    found = worker.shard.lookup(keys, tables, counts, training=True, step=1)
    importance = torch.from_numpy(np.random.default_rng(exchange.rank).pareto(1.0, rows)).float() + 0.01
    gradients = torch.zeros(rows, 32)
    gradients[:, 0] = importance
    worker.shard.update(found, gradients.reshape(-1), None, 0.01, 1)
    return worker


def test_a_round_without_decision_is_skipped_by_all_and_the_next_one_holds_for_all() -> None:
    def work(exchange: ThreadExchange) -> tuple[int, int, float, int]:
        worker = workers_with_rows(exchange, None)
        before = worker.shard.stats().planned
        hold_round(worker)
        assert worker.threshold == 0.0
        assert worker.schedule.rounds == 1
        skipped = worker.shard.stats().planned
        hold_round(worker)
        return before, skipped, worker.threshold, worker.shard.stats().planned

    results = on_each(work)
    assert sum(before for before, _, _, _ in results) > BUDGET
    assert all(before == skipped for before, skipped, _, _ in results)
    assert len({threshold for _, _, threshold, _ in results}) == 1
    assert results[0][2] > 0
    assert 0.8 * BUDGET < sum(after for _, _, _, after in results) <= BUDGET


def test_a_ceiling_holds_for_each_shard_and_others_get_what_it_leaves() -> None:
    ceiling = BUDGET * 2 // 5

    def work(exchange: ThreadExchange) -> tuple[int, int]:
        worker = workers_with_rows(exchange, ceiling, uneven=True)
        for _ in range(4):
            hold_round(worker)
        stats = worker.shard.stats()
        return stats.planned, stats.rows

    results = on_each(work)
    assert all(planned <= ceiling for planned, _ in results)
    assert results[2][0] > 0.95 * ceiling  # the one with most rows is as large as it may be
    assert 0.8 * BUDGET < sum(planned for planned, _ in results) <= BUDGET
