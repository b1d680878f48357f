"""Rounds: what all shards report is brought together, one threshold is decided for all of them, and every shard resizes its rows.

Reports add up, so the exchange adds them on their way: the coordinator hears one of 32 KiB, from the first worker, however many shards
there are. Only shards with ceilings of their own are reported one by one, by the same worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiited_ray.exchange import Exchange
from fiited_ray.methods import fixes_rows
from fiited_ray.policy import BINS, Decision, RoundState, ShardReport, shard_limit

if TYPE_CHECKING:
    from fiited_ray.train.loop import Worker


def fit_budget(worker: Worker) -> None:
    """Hold a round if rows that were loaded pass the budget or a worker's own ceiling: of more workers, or a smaller budget."""
    ceiling, planned = worker.config.policy.max_shard_bytes, worker.embedding.stats().planned
    over = int(ceiling is not None and planned > ceiling)
    total, over_ceiling = worker.exchange.all_reduce(torch.tensor([planned, over])).tolist()
    if over_ceiling or (worker.budget_bytes is not None and total > worker.budget_bytes):
        hold_round(worker, needed=True)
    if worker.budget_bytes is None:  # else it is dealt at each step
        worker.shard.set_limit(ceiling)


def hold_round(worker: Worker, needed: bool = False) -> None:
    """Report, and resize by the coordinator's decision; where none can be had, all workers skip the round. All must call this together.

    Args:
        needed: resize even where the decision would move too little to be worth it.

    Raises:
        RuntimeError: where a round that is needed gets no decision.
    """
    shard = worker.shard
    stats = worker.embedding.stats()
    own = ShardReport(shard.histogram().numpy(), stats.fixed, stats.admitted_bytes, stats.refused, worker.config.policy.max_shard_bytes)
    reports = gather_reports(own, worker.exchange)
    decision = _decision(worker, reports)
    worker.schedule.held(worker.step)
    if decision is None:
        if needed:
            raise RuntimeError(f"step {worker.step}: the rows that were loaded pass the budget, and the coordinator gave no decision")
        return
    if needed or not decision.skipped:
        _resize(worker, decision)
    after = worker.embedding.stats()
    moved = worker.exchange.all_reduce(
        torch.tensor([after.admitted, after.refused, after.resized, after.evicted], dtype=torch.int64)
    ).tolist()
    shard.reset_round_counters()
    names = ("policy/admitted", "policy/refused", "policy/resized", "policy/evicted")
    values: dict[str, float] = dict(zip(names, map(float, moved), strict=True))
    values |= {
        "policy/threshold": decision.threshold,
        "policy/round_bytes_changed": 0.0 if decision.skipped else float(decision.changed_bytes),
    }
    worker.log(values)
    worker.history.importance = (decision.threshold, sum(report.histogram[0] for report in reports))


def gather_reports(own: ShardReport, exchange: Exchange) -> list[ShardReport]:
    """What the coordinator has to know, the same on every worker: the sum of all shards' reports, or with ceilings each one's by rank."""
    if exchange.workers == 1:
        return [own]
    rows = torch.from_numpy(own.histogram).reshape(-1)
    numbers = torch.cat([rows, torch.tensor([own.fixed_bytes, own.admitted_bytes, own.refused])])
    if own.ceiling_bytes is None:
        return [_report_of(exchange.all_reduce(numbers), None, exchange.workers)]
    of_all = numbers.new_zeros(exchange.workers, len(numbers))
    of_all[exchange.rank] = numbers
    return [_report_of(each, own.ceiling_bytes, 1) for each in exchange.all_reduce(of_all)]


def _report_of(numbers: Tensor, ceiling_bytes: int | None, shards: int) -> ShardReport:
    fixed, admitted, refused = numbers[2 * BINS :].tolist()
    return ShardReport(numbers[: 2 * BINS].view(2, BINS).numpy(), fixed, admitted, refused, ceiling_bytes, shards)


def _decision(worker: Worker, reports: list[ShardReport]) -> Decision | None:
    """The first worker asks for it and tells the others."""
    exchange = worker.exchange
    told = torch.zeros(5 + len(reports), dtype=torch.float64)  # nothing is added to what the first one says
    if exchange.rank == 0:
        _, row_bytes = worker.spec.plan()
        state = RoundState(
            None if fixes_rows(worker.config) else worker.budget_bytes,  # what was fixed to fit is not cut
            worker.threshold,
            worker.spec.levels,
            row_bytes,
            worker.step - worker.schedule.last_step,
            worker.schedule.shortest_gap,
        )
        found = worker.decider.decide(worker.step, reports, state)
        if found is not None:
            numbers = [1, found.skipped, found.planned_bytes, found.changed_bytes, found.threshold, *found.thresholds]
            told = torch.tensor(numbers, dtype=torch.float64)
    decided, skipped, planned, changed, threshold, *thresholds = exchange.all_reduce(told).tolist()
    return Decision(threshold, tuple(thresholds), int(planned), int(changed), bool(skipped)) if decided else None


def _resize(worker: Worker, decision: Decision) -> None:
    """Shrink everywhere, deal the bytes anew, then grow: the shards together stay below the budget at every moment."""
    shard, ceiling = worker.shard, worker.config.policy.max_shard_bytes
    one_by_one = len(decision.thresholds) > 1
    growth = shard.shrink(decision.thresholds[worker.exchange.rank if one_by_one else 0])
    held = worker.embedding.stats().planned
    held_by_all, growth_by_all = worker.exchange.all_reduce(torch.tensor([held, growth])).tolist()  # all have shrunk
    if worker.budget_bytes is not None:
        workers = worker.exchange.workers
        shard.set_limit(shard_limit(worker.budget_bytes, held, held_by_all, workers, ceiling, growth, growth_by_all))
    shard.grow()
    worker.threshold = decision.threshold
