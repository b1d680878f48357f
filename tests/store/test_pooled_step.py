"""The store's own pooled lookup and update: the same as the detour over rows outside it, on any number of threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from helpers import make_spec, padded
from torch import Tensor

from fiited_ray.store import Rows, ShardSpec, VhpiShard, ops
from fiited_ray.store.shard import Lookup

FEATURES, BATCH = 2, 3000  # enough lookups for several tasks of each kernel
TABLES = torch.tensor([0, 1], dtype=torch.int32)  # the CPU's, whatever device the tests run on


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def batch(seed: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, offsets and weights of bags of 0 to 3 lookups, with repeated ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (FEATURES * BATCH,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = (torch.rand(int(offsets[-1]), generator=generator) ** 3 * 9000).long()
    return ids, offsets, torch.rand(len(ids), generator=generator) if weighted else None


def need_pools_ids(shard: VhpiShard) -> None:
    if not shard.pools_ids:
        pytest.skip("this device reads by dedup, lookup and pool")


def looked_up(shard: VhpiShard, seed: int, weighted: bool, mean: bool, step: int) -> tuple[Lookup, ops.Bags]:
    ids, offsets, weights = batch(seed, weighted)
    ends, tables = offsets[BATCH::BATCH].contiguous(), torch.tensor([0, 1], dtype=torch.int32)
    local = ops.dedup_ids(ids, ends, tables, shard.spec.seed, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
    return found, ops.Bags(local.inverse, offsets, weights, FEATURES, mean, shard.spec.chunk, shard.spec.chunks)


def trained(spec: ShardSpec, pooled: bool, weighted: bool = False, mean: bool = False) -> VhpiShard:
    """Some steps, with rounds that leave rows of every width and absent ones."""
    shard = VhpiShard(spec)
    for step in range(1, 7):
        found, bags = looked_up(shard, step, weighted, mean, step)
        grad = torch.randn(BATCH, FEATURES, spec.dim, generator=torch.Generator().manual_seed(step))
        norms = ops.lookup_norms(grad, len(found.keys), bags)
        if pooled:
            shard.update_pooled(found, grad, bags, norms, 0.1, step)
        else:
            shard.update(found, ops.wire_gradients(grad, found.widths, bags), norms, 0.1, step)
        if step % 2 == 0:
            shard.resize(4.0)
        shard.check()
    assert len(set(shard.export_rows().widths.tolist())) > 1
    return shard


def assert_equal(one: Rows, other: Rows) -> None:
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("weighted", "mean"), [(False, False), (True, False), (False, True), (True, True)])
def test_pooling_inside_equals_reading_and_pooling_outside(storage: str, weighted: bool, mean: bool) -> None:
    shard = trained(make_spec(storage=storage), pooled=True)
    found, bags = looked_up(shard, 9, weighted, mean, 9)
    assert {0, shard.spec.chunks} < set(found.widths.tolist())
    assert torch.equal(shard.pool(found, bags), ops.pool(shard.read(found), found.widths, bags))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("weighted", "mean"), [(False, False), (True, False), (False, True), (True, True)])
def test_reading_ids_in_one_go_equals_dedup_lookup_and_pooling(storage: str, weighted: bool, mean: bool, four_threads: None) -> None:
    shard = trained(make_spec(storage=storage), pooled=True)
    need_pools_ids(shard)
    ids, offsets, weights = batch(9, weighted)
    ids[::50] += 1 << 40  # ids without a row, among those of rows of every width
    local = ops.dedup_ids(ids, offsets[BATCH::BATCH].contiguous(), TABLES, shard.spec.seed, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=False)
    assert len(set(found.widths.tolist())) == 1 + shard.spec.chunks
    bags = ops.Bags(local.inverse, offsets, weights, FEATURES, mean, shard.spec.chunk, shard.spec.chunks)
    shard.stats()  # what it says of a peak is of the time since the last one
    before = shard.stats()
    assert torch.equal(shard.pool_ids(ids, offsets, TABLES, weights, mean), shard.pool(found, bags))
    assert shard.stats() == before


def test_ids_are_read_from_the_table_of_their_feature() -> None:
    """Features that share a table read the same rows; the same ids in another table are others."""
    shard = trained(make_spec(), pooled=True)
    need_pools_ids(shard)
    ids = torch.arange(100).repeat(3)
    tables = torch.tensor([1, 0, 1], dtype=torch.int32)
    first, other, again = shard.pool_ids(ids, torch.arange(301), tables, None, False).unbind(1)
    assert torch.equal(first, again)
    both = (first != 0).any(1) & (other != 0).any(1)
    assert both.any()
    assert (first != other)[both].any(1).all()


def test_an_empty_batch_of_ids_is_read() -> None:
    shard = trained(make_spec(), pooled=True)
    need_pools_ids(shard)
    none = torch.empty(0, dtype=torch.int64)
    assert shard.pool_ids(none, torch.zeros(1, dtype=torch.int64), TABLES, None, False).shape == (0, 2, 12)
    assert not shard.pool_ids(none, torch.zeros(2 * 5 + 1, dtype=torch.int64), TABLES, None, True).any()


def test_ids_that_cannot_be_read_are_named() -> None:
    shard = VhpiShard(make_spec())
    need_pools_ids(shard)
    ids, offsets = torch.arange(4), torch.arange(5)
    with pytest.raises(RuntimeError, match="table 2 of feature 1 does not exist"):
        shard.pool_ids(ids, offsets, torch.tensor([0, 2], dtype=torch.int32), None, False)
    with pytest.raises(RuntimeError, match="offsets fall at feature 1, position 0"):
        shard.pool_ids(ids, torch.tensor([0, 1, 3, 2, 4]), TABLES, None, False)
    with pytest.raises(RuntimeError, match="end at the number of lookups"):
        shard.pool_ids(ids, torch.tensor([0, 1, 2, 3, 3]), TABLES, None, False)
    with pytest.raises(RuntimeError, match="weights must have 4 elements, not 3"):
        shard.pool_ids(ids, offsets, TABLES, torch.ones(3), False)
    with pytest.raises(RuntimeError, match="from a shard with all buckets alone"):
        VhpiShard(make_spec(first_bucket=1)).pool_ids(ids, offsets, TABLES, None, False)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize(("weighted", "mean"), [(False, False), (True, True)])
def test_updating_from_pooled_gradients_equals_the_way_over_the_wire(optimizer: str, weighted: bool, mean: bool) -> None:
    spec = make_spec(optimizer=optimizer)
    assert_equal(trained(spec, True, weighted, mean).export_rows(), trained(spec, False, weighted, mean).export_rows())


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("budget", [None, 400_000])
def test_the_number_of_threads_changes_nothing(pooled: bool, budget: int | None, four_threads: None) -> None:
    spec = make_spec(budget, storage="bfloat16")
    many = trained(spec, pooled)
    torch.set_num_threads(1)
    one = trained(spec, pooled)
    assert_equal(many.export_rows(), one.export_rows())
    # Without a budget there are many parts of the index; those rebuilt side by side take their old and new lines together.
    timing = {"peak": 0} if budget is None else {}
    assert dataclasses.replace(many.stats(), **timing) == dataclasses.replace(one.stats(), **timing)


@pytest.mark.parametrize("threads", [3, 4])
def test_rows_that_come_on_many_threads_stay_within_the_budget(threads: int, four_threads: None) -> None:
    """Of the smallest rows, for which the index is the largest share."""
    spec = make_spec(16_000_000, chunk=4, chunks=1, optimizer="sgd", storage="bfloat16", levels=(1.0,))

    def filled(threads: int) -> VhpiShard:
        torch.set_num_threads(threads)
        shard = VhpiShard(spec)
        tables, counts = torch.zeros(50_000, dtype=torch.int32), torch.ones(50_000, dtype=torch.int32)
        for step in range(1, 13):
            keys = torch.randint(-(2**63), 2**63 - 1, tables.shape, generator=torch.Generator().manual_seed(step))
            shard.lookup(keys, tables, counts, training=True, step=step)
        shard.check()
        stats = shard.stats()
        assert stats.refused > 0
        assert spec.limit_bytes is not None
        assert stats.peak <= spec.limit_bytes
        return shard

    assert_equal(filled(threads).export_rows(), filled(1).export_rows())


@pytest.mark.parametrize("placed", [True, False])
def test_rows_are_loaded_by_many_threads_as_by_one(placed: bool, four_threads: None) -> None:
    saved = trained(make_spec(optimizer="adam"), pooled=True)
    addresses, _, _ = saved.changed(True)
    rows = saved.take(addresses)
    assert len(addresses) > 4 * 512  # enough for four tasks
    loaded = VhpiShard(saved.spec)
    loaded.restore(saved.state(), saved.threshold)
    if placed:
        loaded.reserve(saved.rows_by_width().sum(0).tolist())
    loaded.put(rows, addresses, placed)
    loaded.seal()
    loaded.check()
    assert_equal(loaded.export_rows(), saved.export_rows())
    for late, early in ((2000, 5), (2000, 1999)):  # far apart, and of one task or of two
        doubled = dataclasses.replace(rows, raw_ids=rows.raw_ids.clone(), tables=rows.tables.clone())
        doubled.raw_ids[late], doubled.tables[late] = rows.raw_ids[early], rows.tables[early]
        with pytest.raises(RuntimeError, match=rf"row {late} \(table .*\) is already in the store"):
            VhpiShard(saved.spec).put(doubled)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_results_that_no_cache_holds_are_those_of_smaller_batches(storage: str, most: int, scaled: bool) -> None:
    """They are written past the caches: bags of one lookup and of none, of rows and of ids without one."""
    shard = VhpiShard(make_spec(chunk=32, chunks=4, levels=(1.0, 2.0, 4.0, 8.0), storage=storage))
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=generator)
    tables, counts = torch.zeros(3000, dtype=torch.int32), torch.ones(3000, dtype=torch.int32)
    shard.lookup(keys[:2000], tables[:2000], counts[:2000], training=True, step=1)
    found = shard.lookup(keys, tables, counts, training=False)
    rows = 10_000
    lengths = torch.randint(0, most + 1, (2 * rows,), generator=generator)
    inverse = torch.randint(0, 3000, (int(lengths.sum()),), generator=generator).int()
    weights = torch.rand(len(inverse), generator=generator)

    def pooled(first: int, end: int) -> Tensor:
        kept = torch.zeros(2, rows, dtype=torch.bool)
        kept[:, first:end] = True
        mine = lengths[kept.flatten()]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mine.cumsum(0)])
        lookups = torch.repeat_interleave(kept.flatten(), lengths)
        return shard.pool(found, ops.Bags(inverse[lookups], offsets, weights[lookups] if scaled else None, 2, scaled, 32, 4))

    whole = pooled(0, rows)
    assert whole.nbytes >= 4 << 20
    assert torch.equal(whole, torch.cat([pooled(first, first + 2000) for first in range(0, rows, 2000)]))


def test_rows_are_read_in_the_order_asked_for() -> None:
    shard = trained(make_spec(), pooled=True)
    found, _ = looked_up(shard, 9, False, False, 9)
    take = torch.tensor([5, 0, 5, len(found.keys) - 1], dtype=torch.int32)
    wide = padded(shard, found)
    parts = shard.read(found, take).split([int(found.widths[row]) * shard.spec.chunk for row in take])
    for row, part in zip(take.tolist(), parts, strict=True):
        assert torch.equal(part, wide[row, : len(part)])


@pytest.mark.parametrize("act", ["read", "pool", "update"])
def test_a_lookup_from_before_a_round_is_refused(act: str) -> None:
    shard = trained(make_spec(), pooled=True)
    found, bags = looked_up(shard, 9, False, False, 9)
    grad = torch.zeros(BATCH, FEATURES, shard.spec.dim)
    acts = {
        "read": lambda: shard.read(found),
        "pool": lambda: shard.pool(found, bags),
        "update": lambda: shard.update_pooled(found, grad, bags, None, 0.1, 10),
    }
    shard.resize(1e6)
    with pytest.raises(RuntimeError, match="look up again after a round"):
        acts[act]()
