"""The compiled store does what its plain-Python twin does, over random histories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import fold, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.store import VhpiShard, ops
from fiited_ray.store.reference import ReferenceShard, key_of


def assert_same(shard: VhpiShard, twin: ReferenceShard) -> None:
    shard.check()
    assert torch.equal(shard.rows_by_width(), twin.rows_by_width().cpu())
    ours, theirs = shard.export_rows(), twin.export_rows()
    for exact in ("widths", "tables"):
        assert torch.equal(getattr(ours, exact), getattr(theirs, exact).cpu()), exact
    keys = [key_of(raw, table, shard.spec.seed) for raw, table in zip(ours.raw_ids.tolist(), ours.tables.tolist(), strict=True)]
    assert keys == [key % 2**64 for key in theirs.raw_ids.tolist()]
    torch.testing.assert_close(ours.importance, theirs.importance.cpu(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.values, theirs.values.cpu(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.state, theirs.state.cpu(), rtol=1e-3, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    optimizer=st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam"]),
    importance=st.sampled_from(["frequency_x_norm", "norm", "lookup_norm_sum", "frequency"]),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
    limited=st.booleans(),
)
def test_random_histories_give_the_same_rows(seed: int, optimizer: str, importance: str, decay: float, limited: bool) -> None:
    spec = make_spec(130_000 if limited else None, optimizer=optimizer, importance=importance, decay=decay)
    shard, twin = VhpiShard(spec), ReferenceShard(spec)
    random = np.random.default_rng(seed)
    for step in range(1, 25):
        ids = torch.from_numpy(random.zipf(1.3, 80) % 400)
        local = ops.dedup_ids(ids, torch.tensor([40, 80]), torch.tensor([0, 1], dtype=torch.int32), spec.seed, 1)
        # small integers times a power of two: norms and importance are then exact, so that widths must be equal
        gradient = torch.from_numpy(random.integers(-3, 4, (local.keys.numel(), spec.dim)) * random.choice([2.0**-6, 1, 64])).float()
        answers = [each.lookup(local.keys, local.tables, local.counts, training=True, step=step, quota=2**31) for each in (shard, twin)]
        assert torch.equal(answers[0].widths, answers[1].widths)
        torch.testing.assert_close(shard.read(answers[0]), twin.read(answers[1]), rtol=1e-3, atol=1e-4)
        for each, found in zip((shard, twin), answers, strict=True):
            each.update(found, fold(gradient, found.widths, spec), gradient.norm(dim=1), 0.05, step, 3 * 2**30)
        if random.random() < 0.3:
            threshold = float(np.float32(random.choice([0.0, 0.01, 0.3, 2.0, 50.0])))
            refused = shard.stats().refused
            shard.resize(threshold)
            if shard.stats().refused > refused:
                return  # out of room: which rows grow then depends on the order they are met in
            twin.resize(threshold)
            assert torch.equal(shard.histogram().sum(1), twin.histogram().sum(1).cpu())
        assert_same(shard, twin)
    assert (shard.stats().lookups, shard.stats().hits) == (twin.lookups, twin.hits)


def test_histogram_puts_rows_where_the_reference_does() -> None:
    spec = make_spec()
    shard, twin = VhpiShard(spec), ReferenceShard(spec)
    local = ops.dedup_ids(torch.arange(200), torch.tensor([100, 200]), torch.tensor([0, 1], dtype=torch.int32), 0, 1)
    gradient = torch.logspace(-12, 4, 200)[:, None].expand(200, spec.dim)
    for each in (shard, twin):
        found = each.lookup(local.keys, local.tables, local.counts, training=True, step=1)
        each.update(found, fold(gradient, found.widths, spec), None, 0.1, 1)
    moved = (shard.histogram() - twin.histogram().cpu())[0].abs().sum()
    assert moved <= 2  # the norm's last bit may cross a bin's edge
    assert shard.histogram()[0].sum() == 200


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_keys_are_a_bijection_that_export_turns_back(seed: int) -> None:
    spec = make_spec(seed=seed)
    shard = VhpiShard(spec)
    raw = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    local = ops.dedup_ids(raw, torch.tensor([6, 6]), torch.tensor([0, 1], dtype=torch.int32), seed, 1)
    assert [key % 2**64 for key in local.keys.tolist()] == [key_of(each, 0, seed) for each in raw.tolist()]
    shard.lookup(local.keys, local.tables, local.counts, training=True)
    assert sorted(shard.export_rows().raw_ids.tolist()) == sorted(raw.tolist())
