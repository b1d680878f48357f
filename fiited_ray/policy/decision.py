"""One round's decision: what all shards report in, a threshold out; and how the bytes that are left are dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fiited_ray.config import ConfigError, PolicyConfig
from fiited_ray.policy.histogram import BINS, bin_edges
from fiited_ray.policy.threshold import find_threshold, planned_bytes, width_of

_LEAST_HEADROOM = 0.005  # of the budget
_AHEAD = 1.5  # times the bytes asked for since the last round, over as many steps as the next one is away at least


@dataclass(frozen=True)
class ShardReport:
    """What the coordinator hears of one shard, or of several without ceilings together: 32 KiB and a few numbers, however many rows.

    Raises:
        ValueError: for a histogram of another shape or dtype, or a ceiling for more than one shard.
    """

    histogram: np.ndarray  # int64 [2, 2048]: rows, and the bytes they hold, by importance bin
    fixed_bytes: int  # needed with no row
    admitted_bytes: int = 0  # of rows let in since the last round
    refused: int = 0  # times a row was turned away for want of room since then
    ceiling_bytes: int | None = None  # this worker's own memory
    shards: int = 1  # whose numbers have been added

    def __post_init__(self) -> None:
        if self.histogram.shape != (2, BINS) or self.histogram.dtype != np.int64:
            raise ValueError(f"histogram: int64 [2, {BINS}] is wanted, not {self.histogram.dtype} {list(self.histogram.shape)}")
        if self.ceiling_bytes is not None and self.shards != 1:
            raise ValueError(f"ceiling_bytes: a ceiling is one shard's own, and this report is of {self.shards}")


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
    thresholds: tuple[float, ...]  # by report; above the global one where a shard's own memory is short
    planned_bytes: int  # of all shards once rows are resized, fixed parts included
    changed_bytes: int  # given back or newly taken by rows, at least
    skipped: bool


def decide(reports: Sequence[ShardReport], state: RoundState, policy: PolicyConfig) -> Decision:
    """Find the global threshold at which all shards together meet the budget, less some headroom for rows to come.

    Histograms add, and the threshold follows from the sum: it is the same whether shards report one by one or together.

    Raises:
        ConfigError: when the budget or a shard's ceiling does not hold what is needed with no row and one narrow row for each shard.
    """
    _check_room(reports, state)
    rows = _summed(reports)[0]
    fixed = sum(report.fixed_bytes for report in reports)
    threshold = _threshold(reports, state, policy, rows, fixed)
    thresholds = tuple(_own_threshold(report, threshold, state) for report in reports)
    alike: dict[float, list[ShardReport]] = {}  # one group, unless a ceiling is in the way
    for report, own in zip(reports, thresholds, strict=True):
        alike.setdefault(own, []).append(report)
    planned, changed = fixed, 0
    for own, group in alike.items():
        together = _summed(group)
        planned += int(planned_bytes(together[0], own, state.levels, state.row_bytes))
        changed += _changed_bytes(together, own, state)
    scale = sum(report.ceiling_bytes or 0 for report in reports) if state.budget_bytes is None else state.budget_bytes
    settled = changed == 0 or changed < policy.min_change * scale
    # A lower threshold is always taken: it moves little, and ids without a row are measured by it. So is the first one above 0.
    urgent = any(report.refused for report in reports) or threshold < state.threshold or (state.threshold == 0 < threshold)
    return Decision(threshold, thresholds, planned, changed, skipped=settled and not urgent)


def smallest_budget(fixed_bytes: int, shards: int, row_bytes: Sequence[int]) -> int:
    """Bytes below which shards, with so much fixed in all, cannot hold one narrow row each."""
    return fixed_bytes + shards * row_bytes[1]


def _check_room(reports: Sequence[ShardReport], state: RoundState) -> None:
    shards = sum(report.shards for report in reports)
    least = smallest_budget(sum(report.fixed_bytes for report in reports), shards, state.row_bytes)
    if state.budget_bytes is not None and state.budget_bytes < least:
        raise ConfigError(
            f"budget: {state.budget_bytes:,} bytes do not hold the fixed parts of {shards} shards and one narrow row each; "
            f"the smallest possible budget is {least:,} bytes"
        )
    for rank, report in enumerate(reports):
        least = smallest_budget(report.fixed_bytes, 1, state.row_bytes)
        if report.ceiling_bytes is not None and report.ceiling_bytes < least:
            raise ConfigError(
                f"policy.max_shard_bytes: {report.ceiling_bytes:,} bytes, but shard {rank} needs {least:,} at least; raise it"
            )


def _threshold(reports: Sequence[ShardReport], state: RoundState, policy: PolicyConfig, rows: np.ndarray, fixed: int) -> float:
    """The global threshold. What a shard with a ceiling cannot use is offered to the others."""
    if state.budget_bytes is None:
        return 0.0
    asked = sum(report.admitted_bytes + report.refused * state.row_bytes[1] for report in reports)
    ahead = _AHEAD * asked * state.steps_ahead / max(1, state.steps_since)
    room = state.budget_bytes - fixed
    headroom = min(policy.headroom * state.budget_bytes, max(_LEAST_HEADROOM * state.budget_bytes, ahead), room / 2)
    threshold = find_threshold(rows, room - headroom, state.levels, state.row_bytes)
    capped = [report for report in reports if _own_threshold(report, threshold, state) > threshold]
    if capped and len(capped) < len(reports):
        kept = sum(_own_room(report) for report in capped)
        threshold = find_threshold(rows - _summed(capped)[0], room - headroom - kept, state.levels, state.row_bytes)
    return threshold


def _own_threshold(report: ShardReport, threshold: float, state: RoundState) -> float:
    """The global threshold, or the higher one that keeps a shard below its own ceiling."""
    if report.ceiling_bytes is None or _planned_bytes(report, threshold, state) - report.fixed_bytes <= _own_room(report):
        return threshold
    return find_threshold(report.histogram[0], _own_room(report), state.levels, state.row_bytes)


def _own_room(report: ShardReport) -> float:
    """Bytes for the rows of a shard with a ceiling."""
    room = (report.ceiling_bytes or 0) - report.fixed_bytes
    return room - min(_LEAST_HEADROOM * (report.ceiling_bytes or 0), room / 2)


def _planned_bytes(report: ShardReport, threshold: float, state: RoundState) -> float:
    return report.fixed_bytes + planned_bytes(report.histogram[0], threshold, state.levels, state.row_bytes)


def _summed(reports: Sequence[ShardReport]) -> np.ndarray:
    total = np.zeros((2, BINS), np.int64)
    for report in reports:
        total += report.histogram
    return total


def _changed_bytes(histogram: np.ndarray, threshold: float, state: RoundState) -> int:
    """Bytes that move at least: by bin, what its rows hold now against what they would hold."""
    edges = bin_edges()
    middles = ((edges[:BINS] + edges[1:]) / 2).astype(np.float32)
    wanted = histogram[0] * np.asarray(state.row_bytes)[width_of(middles, threshold, state.levels)]
    return int(np.abs(wanted - histogram[1]).sum())


def shard_limit(
    budget_bytes: int,
    planned_bytes: int,
    planned_by_all: int,
    workers: int,
    ceiling_bytes: int | None,
    growth_bytes: int = 0,
    growth_by_all: int = 0,
) -> int:
    """Bytes a shard may take until the next round: what its rows take, what they are to grow by, and an even part of what is left.

    All limits together are never more than the budget. None is below what its shard's rows take, unless its ceiling is, as long as
    `planned_by_all` is within the budget; growth beyond what is left is cut in proportion. Plans beyond the budget are cut likewise.
    """
    room = budget_bytes - planned_by_all
    if room < 0:
        limit = planned_bytes * budget_bytes // planned_by_all
    else:
        granted = growth_bytes if growth_by_all <= room else growth_bytes * room // growth_by_all
        limit = planned_bytes + granted + max(0, room - growth_by_all) // workers
    return limit if ceiling_bytes is None else min(limit, ceiling_bytes)
