"""Bytes: every one counted, and never more than the limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import fold, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.config import Config, ConfigError, DataConfig, TrainConfig
from fiited_ray.store import ShardSpec, VhpiShard, ops
from fiited_ray.store.layout import bucket_range, check_budget


def train(shard: VhpiShard, random: np.random.Generator, step: int, lookups: int = 3000, ids: int = 10**6) -> None:
    raw = torch.from_numpy(np.minimum(random.zipf(1.2, lookups), ids))
    local = ops.dedup_ids(raw, torch.tensor([lookups // 2, lookups]), torch.tensor([0, 1], dtype=torch.int32), shard.spec.seed, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
    gradient = torch.from_numpy(random.normal(size=(local.keys.numel(), shard.spec.dim)).astype(np.float32))
    shard.update(found, fold(gradient, found.widths, shard.spec), None, 0.1, step)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    budget=st.integers(120_000, 3_000_000),
    optimizer=st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam"]),
    storage=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_allocated_bytes_never_pass_the_limit_nor_the_plan(seed: int, budget: int, optimizer: str, storage: str) -> None:
    random = np.random.default_rng(seed)
    shard = VhpiShard(make_spec(budget, optimizer=optimizer, storage=storage))
    for step in range(1, 30):
        train(shard, random, step)
        if random.random() < 0.4:
            shard.resize(float(random.choice([0.0, 0.5, 3.0, 10.0, 100.0])))
        shard.check()  # raises when a byte is over the limit or the plan
        stats = shard.stats()
        assert stats.peak <= budget
        assert stats.total == stats.payload + stats.optimizer + stats.index + stats.sketch + stats.slack
        assert stats.slack >= 0


def test_rows_beyond_the_limit_give_way_in_a_round() -> None:
    """As after a load into a smaller budget."""
    full, loaded = (VhpiShard(make_spec(3_000_000)) for _ in range(2))
    for shard in (full, loaded):
        train(shard, np.random.default_rng(0), 1)
    planned = full.stats().planned
    full.resize(2.0)
    wanted = full.stats()
    limit = (wanted.planned + planned) // 2
    loaded.set_limit(limit)
    loaded.resize(2.0)
    stats = loaded.stats()
    assert wanted.planned < limit < planned
    assert (stats.planned, stats.resized, stats.evicted) == (wanted.planned, wanted.resized, wanted.evicted)
    assert (stats.limit, stats.refused) == (limit, 0)
    loaded.check()


def test_shrinking_gives_the_bytes_back() -> None:
    random = np.random.default_rng(0)
    shard = VhpiShard(make_spec(2_000_000))
    for step in range(1, 20):
        train(shard, random, step)
    full = shard.stats()
    shard.resize(1e30)
    empty = shard.stats()
    assert full.total > 800_000
    assert empty.rows == 0
    assert empty.total <= empty.fixed


@pytest.mark.parametrize(("budget", "threshold"), [(8_000_000, 0.0), (1_500_000, 0.3)])
def test_metadata_takes_at_most_24_bytes_a_row_at_every_fill_above_half(budget: int, threshold: float) -> None:
    random = np.random.default_rng(0)
    shard = VhpiShard(make_spec(budget))
    for step in range(1, 60):
        train(shard, random, step, lookups=20_000, ids=10**9)
        if step % 20 == 0:
            shard.resize(threshold)
            stats = shard.stats()
            assert stats.total > budget / 2
            assert stats.index / stats.rows <= 24


def test_slack_after_a_round_is_below_a_tenth() -> None:
    random = np.random.default_rng(0)
    shard = VhpiShard(make_spec(5_000_000))
    for step in range(1, 40):
        train(shard, random, step, lookups=10_000)
    shard.resize(2.0)
    stats = shard.stats()
    assert stats.slack <= 0.1 * stats.total


def test_refused_rows_are_counted_and_read_as_zero() -> None:
    shard = VhpiShard(make_spec(120_000))
    raw = torch.arange(5000)
    local = ops.dedup_ids(raw, torch.tensor([5000, 5000]), torch.tensor([0, 1], dtype=torch.int32), 0, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=1)
    stats = shard.stats()
    assert stats.refused == int((found.widths == 0).sum()) > 0
    assert stats.admitted == int((found.widths == 3).sum()) > 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_impossible_budget_names_the_smallest_possible_one(workers: int) -> None:
    config = Config(data=DataConfig(categorical=("a", "b")), train=TrainConfig(workers=workers))
    with pytest.raises(ConfigError, match="smallest possible budget") as error:
        check_budget(config, 10_000)
    smallest = int(str(error.value).split("here is ")[1].split(" ")[0])
    check_budget(config, smallest)
    for rank in range(workers):
        VhpiShard(ShardSpec.of(config, smallest, rank, workers))
    with pytest.raises(ConfigError):
        check_budget(config, smallest - 2048)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 1000, 1024])
def test_buckets_are_dealt_once_and_evenly(workers: int) -> None:
    ranges = [bucket_range(rank, workers) for rank in range(workers)]
    assert [first for first, _ in ranges][1:] == [end for _, end in ranges][:-1]
    assert (ranges[0][0], ranges[-1][1]) == (0, 1024)
    sizes = [end - first for first, end in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_fixed_bytes_of_all_shards_do_not_depend_on_their_number() -> None:
    config = Config(data=DataConfig(categorical=("a", "b")))
    sums = [sum(ShardSpec.of(config, 2**26, rank, workers).plan()[0] for rank in range(workers)) for workers in (1, 2, 4)]
    assert max(sums) - min(sums) <= 4  # whole bytes
