"""One round's decision: reports of all shards in, a threshold and a byte limit for each shard out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fiited_ray.config import PolicyConfig
from fiited_ray.policy.histogram import BINS, bin_edges
from fiited_ray.policy.threshold import find_threshold, planned_bytes, width_of

_LEAST_HEADROOM = 0.005  # of the budget
_AHEAD = 1.5  # times the bytes admitted since the last round


@dataclass(frozen=True)
class ShardReport:
    """What a shard tells the coordinator: 32 KiB and a few numbers, however many rows it has."""

    histogram: np.ndarray  # int64 [2, 2048]: rows, and the bytes they hold, by importance bin
    fixed_bytes: int  # needed with no row
    admitted_bytes: int = 0  # of rows let in since the last round
    refused: int = 0  # rows turned away for want of room since then
    ceiling_bytes: int | None = None  # this worker's own memory


@dataclass(frozen=True)
class RoundState:
    """What a round needs to know beside the reports; the same for all shards."""

    budget_bytes: int | None  # of all shards together
    threshold: float  # in force now
    levels: tuple[float, ...]
    row_bytes: tuple[int, ...]  # of a row of width 0..k


@dataclass(frozen=True)
class Decision:
    """What is to be done; `skipped` when it would change too little to be worth it."""

    threshold: float  # global
    thresholds: tuple[float, ...]  # by shard; above the global one where a shard's own memory is short
    limits: tuple[int | None, ...]  # bytes by shard, summing to no more than the budget
    planned_bytes: int  # of all shards once rows are resized, fixed parts included
    changed_bytes: int  # given back or newly taken by rows, at least
    skipped: bool


def decide(reports: Sequence[ShardReport], state: RoundState, policy: PolicyConfig) -> Decision:
    """Find the global threshold at which all shards together meet the budget, less some headroom for rows to come.

    The number of shards does not matter: histograms add, and the threshold follows from the sum.
    """
    histogram = np.sum([report.histogram for report in reports], 0)
    fixed = sum(report.fixed_bytes for report in reports)
    if state.budget_bytes is None and all(report.ceiling_bytes is None for report in reports):
        total = int(planned_bytes(histogram[0], 0.0, state.levels, state.row_bytes)) + fixed
        return Decision(0.0, (0.0,) * len(reports), (None,) * len(reports), total, 0, skipped=state.threshold == 0)
    threshold = _threshold(reports, state, policy, histogram[0], fixed)
    thresholds = tuple(max(threshold, _own_threshold(report, state)) for report in reports)
    planned = [
        report.fixed_bytes + int(planned_bytes(report.histogram[0], own, state.levels, state.row_bytes))
        for report, own in zip(reports, thresholds, strict=True)
    ]
    changed = _changed_bytes(histogram, threshold, state)
    scale = state.budget_bytes if state.budget_bytes is not None else sum(report.ceiling_bytes or 0 for report in reports)
    crowded = any(report.refused for report in reports)
    skipped = changed < policy.min_change * scale and not crowded and threshold >= state.threshold and state.threshold > 0
    skipped |= threshold == 0 == state.threshold and not crowded
    return Decision(threshold, thresholds, _limits(reports, planned, state.budget_bytes), sum(planned), changed, skipped)


def _threshold(reports: Sequence[ShardReport], state: RoundState, policy: PolicyConfig, rows: np.ndarray, fixed: int) -> float:
    """The global threshold. What a shard with a ceiling cannot use is offered to the others."""
    if state.budget_bytes is None:
        return 0.0
    admitted = sum(report.admitted_bytes for report in reports)
    headroom = min(policy.headroom * state.budget_bytes, max(_LEAST_HEADROOM * state.budget_bytes, _AHEAD * admitted))
    target = state.budget_bytes - fixed - headroom
    threshold = find_threshold(rows, target, state.levels, state.row_bytes)
    capped = [report for report in reports if _own_threshold(report, state) > threshold]
    if capped and len(capped) < len(reports):
        kept = sum((report.ceiling_bytes or 0) - report.fixed_bytes for report in capped)
        others = rows - np.sum([report.histogram[0] for report in capped], 0)
        threshold = find_threshold(others, target - kept, state.levels, state.row_bytes)
    return threshold


def _own_threshold(report: ShardReport, state: RoundState) -> float:
    """The threshold that keeps a shard below its own ceiling; 0 without one."""
    if report.ceiling_bytes is None:
        return 0.0
    room = report.ceiling_bytes * (1 - _LEAST_HEADROOM) - report.fixed_bytes
    return find_threshold(report.histogram[0], room, state.levels, state.row_bytes)


def _changed_bytes(histogram: np.ndarray, threshold: float, state: RoundState) -> int:
    """Bytes that move at least: by bin, what its rows hold now against what they would hold."""
    edges = bin_edges()
    middles = ((edges[:BINS] + edges[1:]) / 2).astype(np.float32)
    wanted = histogram[0] * np.asarray(state.row_bytes)[width_of(middles, threshold, state.levels)]
    return int(np.abs(wanted - histogram[1]).sum())


def _limits(reports: Sequence[ShardReport], planned: Sequence[int], budget: int | None) -> tuple[int | None, ...]:
    """Each shard's plan and a share of what is left in proportion to it: more bytes where more of the important rows are."""
    if budget is None:
        return tuple(report.ceiling_bytes for report in reports)
    left = max(0, budget - sum(planned))
    total = max(1, sum(planned))
    limits: list[int | None] = []
    for report, plan in zip(reports, planned, strict=True):
        limit = plan + left * plan // total
        limits.append(limit if report.ceiling_bytes is None else min(limit, report.ceiling_bytes))
    over = sum(limit or 0 for limit in limits) - budget
    return tuple(limits) if over <= 0 else tuple((limit or 0) * budget // (budget + over) for limit in limits)
