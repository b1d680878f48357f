"""The importance of absent ids: who wins a row by it, in few bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import fold

from fiited_ray.config import Config, DataConfig, ModelConfig, PolicyConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.policy import RoundState, ShardReport
from fiited_ray.store import ShardSpec, VhpiShard
from fiited_ray.store.reference import ReferenceShard

BUCKETS = 32  # of the 1024: one set for each makes a small sketch


def small_spec(budget: int, **policy: float) -> ShardSpec:
    """A shard of the first 32 buckets."""
    config = Config(data=DataConfig(categorical=("id",)), policy=PolicyConfig(**policy), model=ModelConfig(kind="dcnv2"))
    return ShardSpec.of(config, budget * 1024 // BUCKETS, 0, 1024 // BUCKETS)


def keys_of(ids: np.ndarray) -> np.ndarray:
    """int64: keys of ids >= 0, mixed as the store mixes them, all in the first 32 buckets."""
    with np.errstate(over="ignore"):
        x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(5)).view(np.int64)


def power_law(random: np.random.Generator, lookups: int, exponent: float, ids: int) -> np.ndarray:
    power = 1 - exponent
    return ((random.random(lookups) * ((ids + 1.0) ** power - 1) + 1) ** (1 / power)).astype(np.int64) - 1


def learn(shard: VhpiShard | ReferenceShard, keys: np.ndarray, counts: np.ndarray, norms: np.ndarray, step: int) -> None:
    found = shard.lookup(
        torch.from_numpy(keys), torch.zeros(len(keys), dtype=torch.int32), torch.from_numpy(counts).int(), training=True, step=step
    )
    gradient = torch.zeros(len(keys), shard.spec.dim)
    gradient[:, 0] = torch.from_numpy(norms)
    shard.update(found, fold(gradient, found.widths, shard.spec), None, 1e-3, step)


def has_row(shard: VhpiShard | ReferenceShard, keys: np.ndarray) -> np.ndarray:
    ones = torch.ones(len(keys), dtype=torch.int32)
    return shard.lookup(torch.from_numpy(keys), torch.zeros_like(ones), ones, training=False).widths.numpy() > 0


def test_a_hundredth_of_the_budget_keeps_the_rows_an_exact_counter_must_keep() -> None:
    distinct = 200_000  # about a hundredth of them fits
    spec = small_spec(100 * distinct // 100, sketch_share=0.01, decay=1.0)
    assert spec.sketch_sets == 1
    shard, decider, threshold = VhpiShard(spec), LocalDecider(PolicyConfig()), 0.0
    random = np.random.default_rng(1)
    importance = np.zeros(int(1.3 * distinct), np.float32)
    step = 0
    while np.count_nonzero(importance) < distinct:
        step += 1
        ids, counts = np.unique(power_law(random, 2000, 0.8, len(importance)), return_counts=True)
        norms = np.exp(random.normal(size=len(ids))).astype(np.float32)
        importance[ids] += counts * norms
        learn(shard, keys_of(ids), counts, norms, step)
        stats = shard.stats()
        if step % 5 == 0:
            report = ShardReport(shard.histogram().numpy(), stats.fixed, stats.admitted_bytes, stats.refused)
            decision = decider.decide(step, [report], RoundState(spec.limit_bytes, threshold, spec.levels, spec.plan()[1], 5, 5))
            if decision and not decision.skipped:
                threshold = decision.threshold
                shard.resize(threshold)
            shard.reset_round_counters()
    order = np.argsort(-importance)
    rows = shard.stats().rows
    certain = order[importance[order] > 2 * importance[order[rows]]]
    assert len(certain) > 500
    assert has_row(shard, keys_of(certain)).mean() >= 0.95


def test_a_crowd_of_ids_that_come_once_wins_hardly_any_row() -> None:
    shard = VhpiShard(small_spec(500_000))
    shard.resize(1.0)
    for step in range(1, 21):  # together a hundred times what the entries can hold
        ids = np.arange(step * 1000, step * 1000 + 1000)
        learn(shard, keys_of(ids), np.ones_like(ids), np.full(1000, 0.9, np.float32), step)
    assert shard.stats().rows <= 0.02 * 20_000


def test_an_id_that_keeps_coming_wins_a_row_in_spite_of_a_crowd() -> None:
    shard = VhpiShard(small_spec(500_000))
    shard.resize(1.0)
    faithful = np.arange(50)
    for step in range(1, 61):
        ids = np.concatenate([faithful, np.arange(step * 1000, step * 1000 + 500)])
        learn(shard, keys_of(ids), np.ones_like(ids), np.full(550, 0.3, np.float32), step)
    assert has_row(shard, keys_of(faithful)).mean() >= 0.9


@pytest.mark.parametrize(("seed", "decay"), [(0, 1.0), (1, 0.9), (2, 0.3)])
def test_crowded_sets_admit_the_same_ids_as_the_reference(seed: int, decay: float) -> None:
    spec = small_spec(500_000, decay=decay)
    shard, twin = VhpiShard(spec), ReferenceShard(spec)
    random = np.random.default_rng(seed)
    everyone = keys_of(np.arange(4000))
    for each in (shard, twin):
        each.resize(8.0)
    for step in range(1, 31):
        ids, counts = np.unique(power_law(random, 600, 0.6, 4000), return_counts=True)
        norms = random.integers(1, 9, len(ids)).astype(np.float32)
        for each in (shard, twin):
            learn(each, keys_of(ids), counts, norms, step)
        assert np.array_equal(has_row(shard, everyone), has_row(twin, everyone))
        torch.testing.assert_close(shard.export_rows().importance, twin.export_rows().importance, rtol=1e-5, atol=0)
    assert shard.stats().rows > 20
