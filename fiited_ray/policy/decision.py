"""One round's decision: reports of all shards in, a threshold for each shard out; and how the bytes that are left are dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fiited_ray.config import PolicyConfig
from fiited_ray.policy.histogram import BINS, bin_edges
from fiited_ray.policy.threshold import find_threshold, planned_bytes, width_of

_LEAST_HEADROOM = 0.005  # of the budget
_AHEAD = 1.5  # times the bytes asked for since the last round, over as many steps as the next one is away at least


@dataclass(frozen=True)
class ShardReport:
    """What a shard tells the coordinator: 32 KiB and a few numbers, however many rows it has."""

    histogram: np.ndarray  # int64 [2, 2048]: rows, and the bytes they hold, by importance bin
    fixed_bytes: int  # needed with no row
    admitted_bytes: int = 0  # of rows let in since the last round
    refused: int = 0  # times a row was turned away for want of room since then
    ceiling_bytes: int | None = None  # this worker's own memory


@dataclass(frozen=True)
class RoundState:
    """What a round needs to know beside the reports; the same for all shards."""

    budget_bytes: int | None  # of all shards together
    threshold: float  # in force now
    levels: tuple[float, ...]
    row_bytes: tuple[int, ...]  # of a row of width 0..k
    steps_since: int = 1  # steps since the last round
    steps_ahead: int = 1  # fewest steps to the next one


@dataclass(frozen=True)
class Decision:
    """What is to be done; `skipped` when it would change too little to be worth it."""

    threshold: float  # global
    thresholds: tuple[float, ...]  # by shard; above the global one where a shard's own memory is short
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
        return Decision(0.0, (0.0,) * len(reports), total, 0, skipped=state.threshold == 0)
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
    return Decision(threshold, thresholds, sum(planned), changed, skipped)


def _threshold(reports: Sequence[ShardReport], state: RoundState, policy: PolicyConfig, rows: np.ndarray, fixed: int) -> float:
    """The global threshold. What a shard with a ceiling cannot use is offered to the others."""
    if state.budget_bytes is None:
        return 0.0
    asked = sum(report.admitted_bytes + report.refused * state.row_bytes[1] for report in reports)
    ahead = _AHEAD * asked * state.steps_ahead / max(1, state.steps_since)
    headroom = min(policy.headroom * state.budget_bytes, max(_LEAST_HEADROOM * state.budget_bytes, ahead))
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


def shard_limit(budget_bytes: int, planned_bytes: int, planned_by_all: int, workers: int, ceiling_bytes: int | None) -> int:
    """Bytes a shard may take until the next round: what its rows are planned to take, and an even part of what is left.

    More bytes where more of the important rows are; all limits together are never more than the budget.
    """
    limit = planned_bytes + (budget_bytes - planned_by_all) // workers
    return limit if ceiling_bytes is None else min(limit, ceiling_bytes)
