"""Threshold, decision and schedule: pure functions, tested as such."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.config import ConfigError, PolicyConfig
from fiited_ray.policy import (
    BINS,
    RoundSchedule,
    RoundState,
    ShardReport,
    bin_edges,
    decide,
    find_threshold,
    importance_bin,
    levels_of,
    planned_bytes,
    shard_limit,
    smallest_budget,
    width_of,
)

ROW_BYTES = (0, 59, 91, 123, 155)
LEVELS = levels_of(4.0, 4)


def draw(seed: int, rows: int = 20_000) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(-8, 3, rows).astype(np.float32)


def histogram(importance: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    held = np.asarray(ROW_BYTES)[width_of(importance, threshold, LEVELS)]
    bins = importance_bin(importance)
    return np.stack([np.bincount(bins, minlength=BINS), np.bincount(bins, held, BINS)]).astype(np.int64)


def state(budget: int | None, threshold: float = 0.0) -> RoundState:
    return RoundState(budget, threshold, LEVELS, ROW_BYTES)


@given(st.integers(0, 2**32), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_rows_at_the_found_threshold_meet_the_target(seed: int, share: float) -> None:
    importance = draw(seed)
    target = share * ROW_BYTES[-1] * len(importance)
    threshold = find_threshold(histogram(importance)[0], target, LEVELS, ROW_BYTES)
    used = np.asarray(ROW_BYTES)[width_of(importance, threshold, LEVELS)].sum()
    assert abs(used - target) < 0.02 * target + 10 * ROW_BYTES[-1]


@given(st.integers(0, 2**32), st.floats(0.01, 0.9), st.floats(1.01, 1.5))
@settings(max_examples=50, deadline=None)
def test_more_bytes_never_raise_the_threshold(seed: int, share: float, more: float) -> None:
    rows = histogram(draw(seed))[0]
    target = share * ROW_BYTES[-1] * rows.sum()
    assert find_threshold(rows, target * more, LEVELS, ROW_BYTES) <= find_threshold(rows, target, LEVELS, ROW_BYTES)


@given(st.integers(0, 2**32), st.floats(0.001, 1000), st.floats(0.1, 0.9), st.floats(0.02, 0.9))
@settings(max_examples=100, deadline=None)
def test_rows_of_equal_importance_do_not_take_more_than_the_target(seed: int, equal: float, part: float, share: float) -> None:
    importance = np.random.default_rng(seed).lognormal(0, 2, 20_000).astype(np.float32)
    importance[: int(part * len(importance))] = equal
    target = share * ROW_BYTES[-1] * len(importance)
    threshold = find_threshold(histogram(importance)[0], target, LEVELS, ROW_BYTES)
    assert np.asarray(ROW_BYTES)[width_of(importance, threshold, LEVELS)].sum() < 1.03 * target


@given(st.lists(st.integers(0, 1000), min_size=40, max_size=40), st.floats(0, 1), st.floats(1, 2))
@settings(max_examples=100, deadline=None)
def test_any_histogram_has_a_threshold_that_plans_at_most_the_target_and_falls_with_it(
    counts: list[int], share: float, more: float
) -> None:
    rows = np.zeros(BINS, np.int64)
    rows[[*range(10), *range(1000, 1020), *range(BINS - 10, BINS)]] = counts
    target = share * ROW_BYTES[-1] * rows.sum()
    low, high = (find_threshold(rows, each, LEVELS, ROW_BYTES) for each in (target * more, target))
    assert low <= high
    assert planned_bytes(rows, high, LEVELS, ROW_BYTES) <= target
    assert high == float(np.float32(high))


@pytest.mark.parametrize("equal", [1.0, 1.01, 2.0**30, 0.0])
def test_equal_rows_stay_together_or_go_together(equal: float) -> None:
    importance = np.full(1000, equal, np.float32)
    rows = np.bincount(importance_bin(importance), minlength=BINS)
    kept = [int(width_of(importance, find_threshold(rows, room * 155, (1.0,), (0, 155)), (1.0,)).sum()) for room in (999, 1000)]
    assert kept == [0, 1000]


def test_rows_above_the_last_edge_count_whole() -> None:
    importance = np.repeat([*bin_edges()[BINS - 20 : BINS - 1], 2.0**25], 100).astype(np.float32)
    rows = np.bincount(importance_bin(importance), minlength=BINS)
    assert rows[-1] == 100
    cut = float(bin_edges()[BINS - 1]) * 1.01
    assert planned_bytes(rows, cut, (1.0,), (0, 155)) == width_of(importance, cut, (1.0,)).sum() * 155 == 100 * 155


def test_equal_rows_on_the_edge_of_a_bin_stay_when_those_below_must_go() -> None:
    importance = np.concatenate([np.full(1000, 1.0), np.full(1000, 0.99)]).astype(np.float32)
    threshold = find_threshold(np.bincount(importance_bin(importance), minlength=BINS), 1500 * 155, (1.0,), (0, 155))
    assert width_of(importance, threshold, (1.0,)).tolist() == [1] * 1000 + [0] * 1000


def test_the_threshold_is_zero_when_everything_fits() -> None:
    rows = histogram(draw(0))[0]
    assert find_threshold(rows, float(ROW_BYTES[-1] * rows.sum()), LEVELS, ROW_BYTES) == 0.0
    assert width_of(np.zeros(3, np.float32), 0.0, LEVELS).tolist() == [4, 4, 4]


def test_one_chunk_keeps_the_most_important_rows_whole() -> None:
    importance = draw(1)
    rows = np.bincount(importance_bin(importance), minlength=BINS)
    threshold = find_threshold(rows, 1000 * 155, (1.0,), (0, 155))
    kept = np.flatnonzero(width_of(importance, threshold, (1.0,)))
    assert abs(len(kept) - 1000) < 30
    assert set(kept) == set(np.argsort(-importance)[: len(kept)])


def test_bins_hold_what_their_edges_say() -> None:
    importance = draw(2)
    edges, bins = bin_edges(), importance_bin(importance)
    assert np.all(edges[bins] <= importance)
    assert np.all(importance < edges[bins + 1])
    assert importance_bin(np.array([0.0, 1e-30, 1e30], np.float32)).tolist() == [0, 0, BINS - 1]


def test_planned_bytes_at_zero_are_all_rows_at_full_width() -> None:
    rows = histogram(draw(3))[0]
    assert planned_bytes(rows, 0.0, LEVELS, ROW_BYTES) == 20_000 * 155


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_the_number_of_shards_does_not_change_the_threshold(seed: int, shards: int) -> None:
    importance = draw(seed, 5000)
    owner = np.random.default_rng(seed + 1).integers(0, shards, len(importance))
    budget, fixed = 5000 * 80 + 60_000, [60_000 // shards] * shards
    fixed[0] += 60_000 - sum(fixed)
    one = decide([ShardReport(histogram(importance), 60_000)], state(budget), PolicyConfig())
    many = decide([ShardReport(histogram(importance[owner == r]), fixed[r]) for r in range(shards)], state(budget), PolicyConfig())
    assert many.threshold == one.threshold
    assert set(many.thresholds) == {many.threshold}


@given(st.integers(0, 2**32), st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_the_plan_stays_below_the_budget(seed: int, share: float) -> None:
    importance = draw(seed)
    budget = int(share * 155 * len(importance)) + 100_000
    decision = decide([ShardReport(histogram(importance), 100_000)], state(budget), PolicyConfig())
    assert decision.planned_bytes <= budget
    assert decision.planned_bytes > 0.9 * budget


def test_a_round_that_would_change_little_is_skipped_unless_rows_were_refused() -> None:
    importance, policy = draw(4), PolicyConfig(headroom=0.0)
    budget = 1_000_000
    first = decide([ShardReport(histogram(importance), 0)], state(budget), policy)
    assert not first.skipped
    settled = histogram(importance, first.threshold)
    assert decide([ShardReport(settled, 0)], state(budget, first.threshold), policy).skipped
    assert not decide([ShardReport(settled, 0, refused=1)], state(budget, first.threshold), policy).skipped


def test_headroom_follows_what_was_asked_for_up_to_its_bound() -> None:
    importance, budget = draw(5), 1_000_000
    quiet, asked, flooded = (
        decide([ShardReport(histogram(importance), 0, admitted_bytes=more)], state(budget), PolicyConfig(headroom=0.1)).planned_bytes
        for more in (0, 40_000, 10**9)
    )
    assert quiet == pytest.approx(0.995 * budget, rel=0.01)
    assert asked == pytest.approx(0.94 * budget, rel=0.01)
    assert flooded == pytest.approx(0.9 * budget, rel=0.01)


def test_a_shard_with_little_memory_of_its_own_prunes_more_and_the_others_get_its_bytes() -> None:
    a, b = draw(6), draw(7)
    budget = 1_500_000
    free = decide([ShardReport(histogram(a), 0), ShardReport(histogram(b), 0)], state(budget), PolicyConfig())
    tight = decide([ShardReport(histogram(a), 0, ceiling_bytes=300_000), ShardReport(histogram(b), 0)], state(budget), PolicyConfig())
    assert tight.thresholds[0] > free.threshold > tight.thresholds[1]
    assert planned_bytes(histogram(a)[0], tight.thresholds[0], LEVELS, ROW_BYTES) <= 300_000
    assert 0.95 * budget < tight.planned_bytes <= budget


@pytest.mark.parametrize("budget", [None, 1_500_000])
def test_a_ceiling_is_kept_with_and_without_a_budget_and_then_left_at_rest(budget: int | None) -> None:
    a, b = draw(10), draw(11)
    thresholds, settled = (0.0, 0.0), state(budget)
    for skipped in (False, True):
        held = [histogram(each, threshold) for each, threshold in zip((a, b), thresholds, strict=True)]
        decision = decide([ShardReport(held[0], 0, ceiling_bytes=300_000), ShardReport(held[1], 0)], settled, PolicyConfig())
        assert decision.skipped == skipped
        thresholds, settled = decision.thresholds, state(budget, decision.threshold)
    assert planned_bytes(histogram(a)[0], thresholds[0], LEVELS, ROW_BYTES) <= 300_000


def test_a_budget_that_holds_no_row_is_refused_and_the_smallest_one_named() -> None:
    reports = [ShardReport(histogram(draw(12, 1000)), fixed) for fixed in (50_000, 60_000)]
    least = smallest_budget(110_000, 2, ROW_BYTES)
    assert least == 110_000 + 2 * 59
    with pytest.raises(ConfigError, match=r"109,000 bytes .* smallest possible budget is 110,118 bytes"):
        decide(reports, state(109_000), PolicyConfig())
    assert decide(reports, state(least), PolicyConfig()).planned_bytes <= least


def test_headroom_leaves_rows_half_of_what_the_fixed_parts_leave() -> None:
    report = ShardReport(histogram(draw(15, 1000)), 110_000, admitted_bytes=10**9)
    decision = decide([report], state(112_000), PolicyConfig(headroom=0.5))
    assert 110_500 < decision.planned_bytes <= 111_000


def test_a_ceiling_that_holds_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_shard_bytes: 1,000 bytes, but shard 0 needs 1,059"):
        decide([ShardReport(histogram(draw(13, 100)), 1000, ceiling_bytes=1000)], state(None), PolicyConfig())


def test_a_threshold_that_falls_is_taken_however_little_it_moves() -> None:
    importance = draw(14)
    settled = decide([ShardReport(histogram(importance), 0)], state(1_000_000), PolicyConfig()).threshold
    report = ShardReport(histogram(importance, settled), 0)
    assert not decide([report], state(1_000_000, settled * 1.0001), PolicyConfig()).skipped
    assert decide([report], state(1_000_000, settled * 0.9999), PolicyConfig()).skipped


def test_without_a_budget_nothing_is_pruned() -> None:
    decision = decide([ShardReport(histogram(draw(8)), 0)], state(None), PolicyConfig())
    assert (decision.threshold, decision.skipped) == (0.0, True)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.integers(0, 10**10))
def test_limits_together_are_never_more_than_the_budget(planned: list[int], more: int) -> None:
    budget = sum(planned) + more
    limits = [shard_limit(budget, each, sum(planned), len(planned), None) for each in planned]
    assert sum(limits) <= budget
    assert all(limit >= each for limit, each in zip(limits, planned, strict=True))
    assert sum(limits) > budget - len(planned)


GROWING = st.lists(st.tuples(st.integers(1, 10**9), st.integers(0, 10**9)), min_size=1, max_size=9)


@given(GROWING, st.floats(0, 2))
def test_growth_beyond_the_room_is_cut_and_never_another_shards_rows(shards: list[tuple[int, int]], share: float) -> None:
    held, growth = (sum(each) for each in zip(*shards, strict=True))
    budget = held + int(share * growth)
    limits = [shard_limit(budget, mine, held, len(shards), None, more, growth) for mine, more in shards]
    assert sum(limits) <= budget
    assert all(limit >= mine for limit, (mine, _) in zip(limits, shards, strict=True))
    if growth <= budget - held:
        assert all(limit >= mine + more for limit, (mine, more) in zip(limits, shards, strict=True))


@given(st.lists(st.integers(10**6, 10**9), min_size=1, max_size=9), st.floats(0.5, 0.999))
def test_limits_for_plans_beyond_the_budget_are_within_it_and_above_nothing(planned: list[int], share: float) -> None:
    budget = int(share * sum(planned))
    limits = [shard_limit(budget, each, sum(planned), len(planned), None) for each in planned]
    assert sum(limits) <= budget
    assert min(limits) > 0


@pytest.mark.parametrize("wrong", [np.zeros((2, BINS), np.int32), np.zeros((2, BINS + 1), np.int64), np.zeros(BINS, np.int64)])
def test_a_histogram_of_another_form_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"histogram: int64 \[2, 2048\] is wanted"):
        ShardReport(wrong, 0)


def test_a_report_is_32_kib_whatever_the_number_of_rows() -> None:
    assert histogram(draw(9, 100)).nbytes == histogram(draw(9, 100_000)).nbytes == 32 * 1024


def rounds(policy: PolicyConfig, steps: int, crowded: range) -> list[int]:
    schedule, held = RoundSchedule(policy), []
    for step in range(1, steps):
        if schedule.due(step, step in crowded):
            schedule.held(step)
            held.append(step)
    return held


def test_rounds_are_close_at_first_and_then_an_interval_apart() -> None:
    assert rounds(PolicyConfig(first_round=10, interval=100), 500, range(0)) == [10, 30, 70, 150, 250, 350, 450]


def test_rounds_stay_close_while_rows_find_no_room() -> None:
    held = rounds(PolicyConfig(first_round=10, interval=100), 400, range(400))
    assert held == list(range(1, 400))


def test_rows_that_find_no_room_bring_rounds_forward() -> None:
    policy = PolicyConfig(first_round=40, interval=100)
    assert rounds(policy, 60, range(10, 20)) == [10, 12, 14, 16, 18, 58]
