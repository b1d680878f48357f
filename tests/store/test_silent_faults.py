"""Faults that dynamic embedding tables are known for, each of them silent elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers import fold, keys_of, learn, make_spec, padded, read

from fiited_ray.config import EmbeddingConfig
from fiited_ray.store import VhpiShard, bucket_range, ops
from fiited_ray.store.reference import initial_values, key_of


def importance_of(shard: VhpiShard, raw_id: int, table: int = 0) -> float:
    rows = shard.export_rows()
    at = ((rows.raw_ids == raw_id) & (rows.tables == table)).nonzero().item()
    return float(rows.importance[at])


def test_frequency_counts_every_lookup_not_every_distinct_id() -> None:
    shard = VhpiShard(make_spec(importance="frequency", decay=1.0))
    ids = torch.tensor([7, 7, 7, 8])
    local = ops.dedup_ids(ids, torch.tensor([4]), torch.tensor([0], dtype=torch.int32), 0, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=1)
    shard.update(found, fold(torch.ones(2, 12), found.widths, shard.spec), None, 0.1, 1)
    assert (importance_of(shard, 7), importance_of(shard, 8)) == (3.0, 1.0)


def test_counts_of_keys_that_arrive_from_several_workers_are_summed() -> None:
    keys, tables, counts, inverse = ops.dedup_keys(
        torch.tensor([5, 9, 5, 5]), torch.tensor([0, 0, 0, 1], dtype=torch.int32), torch.tensor([2, 1, 40, 7], dtype=torch.int32)
    )
    assert (keys.tolist(), tables.tolist(), counts.tolist(), inverse.tolist()) == ([5, 9, 5], [0, 0, 1], [42, 1, 7], [0, 1, 0, 2])


def test_gradients_that_arrive_for_one_row_from_several_workers_are_added() -> None:
    shard = VhpiShard(make_spec(optimizer="sgd", importance="norm", decay=1.0))
    keys, tables = keys_of([1, 2], [0, 0])
    found = shard.lookup(keys, tables, torch.ones(2, dtype=torch.int32), training=True, step=1)
    before = padded(shard, found)
    arrived = torch.tensor([1.0] * 12 + [3.0] * 12 + [10.0] * 12)
    shard.update(found, arrived, None, 0.5, 1, target=torch.tensor([0, 1, 0], dtype=torch.int32))
    torch.testing.assert_close(before - padded(shard, found), torch.tensor([[5.5] * 12, [1.5] * 12]))
    assert importance_of(shard, 1) == pytest.approx(11 * 12**0.5)  # the norm of the sum, not the sum of norms


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_a_row_that_comes_back_has_clean_values_state_and_importance(optimizer: str) -> None:
    shard = VhpiShard(make_spec(optimizer=optimizer, importance="norm", decay=1.0))
    for step in range(1, 4):
        learn(shard, [1, 2, 3], torch.full((3, 12), 5.0), step)
    shard.resize(1e9)
    assert shard.stats().rows == 0
    shard.resize(0.0)
    keys, tables = keys_of([1, 4], [0, 0])
    found = shard.lookup(keys, tables, torch.ones(2, dtype=torch.int32), training=True, step=5)
    for at, raw_id in enumerate([1, 4]):
        fresh = torch.from_numpy(initial_values(key_of(raw_id, 0, 0), 0, 0, 12, 0.1))
        torch.testing.assert_close(padded(shard, found)[at], fresh)
    rows = shard.export_rows()
    assert bool((rows.state == 0).all())
    assert bool((rows.importance == 0).all())


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_chunk_that_comes_back_has_clean_values_and_state_and_the_rest_keeps_its_own(optimizer: str) -> None:
    shard = VhpiShard(make_spec(optimizer=optimizer, importance="norm", decay=1.0, restore_scale=0.0))
    learn(shard, [1], torch.full((1, 12), 2.0), 1)
    before = padded(shard, read(shard, [1]))
    importance = importance_of(shard, 1)
    shard.resize(importance / 2)  # level of the second chunk is 4: one chunk stays
    assert read(shard, [1]).widths.tolist() == [1]
    shard.resize(importance / 1000)
    after = padded(shard, read(shard, [1]))
    assert torch.equal(after[:, :4], before[:, :4])
    assert bool((after[:, 4:] == 0).all())
    state = shard.export_rows().state.reshape(-1, 12)
    assert bool((state[:, :4] != 0).all())
    assert bool((state[:, 4:] == 0).all())


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_the_gradient_that_wins_an_id_its_row_is_not_lost(optimizer: str) -> None:
    shard = VhpiShard(make_spec(optimizer=optimizer, importance="norm", decay=1.0))
    shard.resize(1.0)
    gradient = torch.ones(4, 12) * torch.tensor([[0.1], [1.0], [4.0], [16.0]])  # the norm of a chunk is twice the factor
    assert learn(shard, [1, 2, 3, 4], gradient, 1).widths.tolist() == [0, 0, 0, 0]
    won = read(shard, [1, 2, 3, 4])
    assert won.widths.tolist() == [0, 1, 2, 3]
    short = VhpiShard(make_spec(optimizer=optimizer, importance="norm", decay=1.0, chunks=1, levels=(1.0,)))
    learn(short, [2, 3, 4], gradient[1:, :4], 1)  # as if the ids had had a row of one chunk before the step
    assert torch.equal(padded(shard, won)[1:, :4], padded(short, read(short, [2, 3, 4])))
    for at, raw_id in enumerate([3, 4], 2):  # the other chunks are as new
        fresh = torch.from_numpy(initial_values(key_of(raw_id, 0, 0), 0, 0, 4 * at, 0.1))
        torch.testing.assert_close(padded(shard, won)[at, 4 : 4 * at], fresh[4:])
    assert importance_of(shard, 4) == 32.0
    rows, taught = shard.export_rows(), short.export_rows()
    assert torch.equal(rows.raw_ids, taught.raw_ids)
    moments = {"adagrad": 1, "adam": 2}.get(optimizer)
    if moments is None:  # no state by dimension
        assert torch.equal(rows.state, taught.state)
        return
    sizes = [moments * 4 * int(width) for width in rows.widths]
    for state, first in zip(rows.state.split(sizes), taught.state.split(moments * 4), strict=True):
        by_chunk = state.reshape(moments, -1, 4)
        assert bool((first != 0).all())
        assert torch.equal(by_chunk[:, 0], first.reshape(moments, 4))
        assert not bool(by_chunk[:, 1:].any())


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_slots_of_other_ids_leave_no_trace(optimizer: str, storage: str) -> None:
    spec = make_spec(optimizer=optimizer, storage=storage, importance="norm", decay=1.0)
    others, ids = list(range(100)), list(range(1000, 1100))
    used, fresh = VhpiShard(spec), VhpiShard(spec)
    for step, strength in enumerate((1.0, 30.0, 900.0), 1):
        learn(used, others, torch.full((100, 12), strength), step)
        used.resize(strength)  # rows of every width have stood in the slots
    used.resize(1e9)
    for shard in (used, fresh):
        shard.resize(0.0)
        for step in range(4, 7):
            learn(shard, ids, torch.randn(100, 12, generator=torch.Generator().manual_seed(step)), step)
    assert used.stats().rows == 100
    for name, tensor in fresh.export_rows().tensors().items():
        assert torch.equal(tensor, used.export_rows().tensors()[name]), name


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_state_narrows_with_its_row(optimizer: str, storage: str) -> None:
    spec = make_spec(optimizer=optimizer, storage=storage, importance="norm", decay=1.0)
    shard = VhpiShard(spec)
    learn(shard, [1], torch.ones(1, 12), 1)
    for width in (3, 2, 1):
        shard.resize(importance_of(shard, 1) / 4 ** (width - 1) / 1.5)
        stats = shard.stats()
        assert read(shard, [1]).widths.tolist() == [width]
        assert stats.optimizer == spec.state_bytes(width)
        assert stats.payload == width * spec.chunk * spec.value_bytes


def test_no_embedding_is_zero_after_eviction_with_rowwise_adagrad_and_a_shared_table() -> None:
    shard = VhpiShard(make_spec(optimizer="rowwise_adagrad", importance="norm", decay=1.0, tables=1))
    local = ops.dedup_ids(torch.tensor([1, 2, 2, 3]), torch.tensor([2, 4]), torch.tensor([0, 0], dtype=torch.int32), 0, 1)
    assert local.counts.tolist() == [1, 2, 1]  # two features share the table: id 2 is one row
    for step in range(1, 31):
        found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
        shard.update(found, fold(torch.randn(3, 12), found.widths, shard.spec), None, 0.1, step)
        if step % 5 == 0:
            shard.resize(1e6 if step % 10 else 0.0)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=31)
    assert bool((padded(shard, found).abs().sum(1) > 0).all())


def test_a_lookup_without_a_row_reads_zero_and_is_counted() -> None:
    shard = VhpiShard(make_spec())
    learn(shard, [1], torch.ones(1, 12), 1)
    shard.resize(1e9)
    keys, tables = keys_of([1, 2], [0, 0])
    found = shard.lookup(keys, tables, torch.tensor([3, 4], dtype=torch.int32), training=True, step=2)
    stats = shard.stats()
    assert padded(shard, found).abs().sum() == 0
    assert (stats.lookups, stats.hits) == (8, 0)


def test_the_fused_adagrad_is_torchs_defaults_included() -> None:
    eps = EmbeddingConfig().eps
    assert eps == torch.optim.Adagrad([torch.zeros(1)]).defaults["eps"]
    shard = VhpiShard(make_spec(optimizer="adagrad", eps=eps))
    keys, _ = keys_of([5], [0])
    weight = torch.nn.Parameter(torch.from_numpy(initial_values(int(keys[0]) % 2**64, 0, 0, 12, 0.1)))
    optimizer = torch.optim.Adagrad([weight], lr=0.1)
    for step in range(1, 20):
        gradient = torch.randn(12, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 5 - 6)
        learn(shard, [5], gradient[None], step)
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(padded(shard, read(shard, [5]))[0], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("eps", [1e-10, 1e-8, 1e-3])
def test_eps_is_the_configured_one_and_stands_outside_the_root(optimizer: str, eps: float) -> None:
    shard = VhpiShard(make_spec(optimizer=optimizer, eps=eps))
    keys, _ = keys_of([5], [0])
    before = torch.from_numpy(initial_values(int(keys[0]) % 2**64, 0, 0, 12, 0.1))
    learn(shard, [5], torch.full((1, 12), 1e-4), 1, lr=0.01)
    moved = before - padded(shard, read(shard, [5]))[0]
    torch.testing.assert_close(moved, torch.full((12,), 0.01 * 1e-4 / (1e-4 + eps)), rtol=1e-3, atol=1e-7)


def test_the_fused_adam_is_torchs_sparse_adam() -> None:
    shard = VhpiShard(make_spec(optimizer="adam", eps=1e-8))
    raw = list(range(6))
    untouched = VhpiShard(make_spec(optimizer="adam"))
    start = padded(untouched, learn(untouched, raw, torch.zeros(6, 12), 1))
    table = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    for step in range(1, 15):
        touched = [each for each in raw if (each + step) % 3]
        gradient = torch.randn(len(touched), 12, generator=torch.Generator().manual_seed(step))
        learn(shard, touched, gradient, step)
        table.grad = torch.sparse_coo_tensor(torch.tensor([touched]), gradient, (6, 12))
        optimizer.step()
    torch.testing.assert_close(padded(shard, read(shard, raw)), table.detach(), rtol=1e-4, atol=1e-5)


def test_duplicate_ids_in_a_batch_learn_as_in_plain_torch() -> None:
    spec = make_spec(optimizer="sgd")
    shard = VhpiShard(spec)
    ids = torch.tensor([3, 3, 4, 3, 5, 4])
    local = ops.dedup_ids(ids, torch.tensor([6]), torch.tensor([0], dtype=torch.int32), 0, 1)
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=1)
    table = torch.nn.Embedding(6, 12, _weight=torch.zeros(6, 12))
    with torch.no_grad():
        table.weight[[3, 4, 5]] = padded(shard, found)
    grad = torch.randn(6, 1, 12, generator=torch.Generator().manual_seed(0))
    table(ids).backward(grad[:, 0])
    bags = ops.Bags(local.inverse, torch.arange(7), None, 1, False, 4, 3)
    shard.update(found, ops.wire_gradients(grad, found.widths, bags), None, 0.1, 1)
    expected = table.weight.detach() - 0.1 * table.weight.grad
    torch.testing.assert_close(padded(shard, read(shard, [3, 4, 5])), expected[[3, 4, 5]])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_key_has_one_owner_whatever_the_number_of_workers(workers: int) -> None:
    local = ops.dedup_ids(torch.arange(5000), torch.tensor([5000]), torch.tensor([0], dtype=torch.int32), 0, workers)
    assert int(local.splits.sum()) == 5000
    assert int(local.splits.min()) > 0.8 * 5000 / workers
    for rank, keys in enumerate(local.keys.split(local.splits.tolist())):
        first, end = bucket_range(rank, workers)
        buckets = (keys >> 54) & 1023
        assert bool(((buckets >= first) & (buckets < end)).all())


def test_a_gradient_that_is_not_finite_names_table_and_id() -> None:
    shard = VhpiShard(make_spec())
    with pytest.raises(RuntimeError, match="table 1, id 77 is not finite"):
        learn(shard, [77], torch.full((1, 12), float("nan")), 1, table=1)


def test_a_lookup_from_before_a_round_cannot_be_used_for_an_update() -> None:
    shard = VhpiShard(make_spec(importance="norm"))
    learn(shard, [1, 2], torch.ones(2, 12), 1)
    keys, tables = keys_of([1, 2], [0, 0])
    found = shard.lookup(keys, tables, torch.ones(2, dtype=torch.int32), training=True, step=2)
    shard.resize(importance_of(shard, 1) / 2)
    with pytest.raises(RuntimeError, match="look up again"):
        shard.update(found, torch.zeros(24), None, 0.1, 2)


@pytest.mark.parametrize("start", [1.0, -1.0])
@pytest.mark.parametrize("towards_zero", [False, True])
@pytest.mark.parametrize(("storage", "mantissa"), [("bfloat16", 7), ("float16", 10)])
def test_many_small_updates_add_up_on_average(storage: str, mantissa: int, towards_zero: bool, start: float) -> None:
    """Steps far below a unit in the last place: rounding to nearest would lose all of them, truncation all or far too much."""
    rows, steps, change = 1000, 100, 2e-4
    shard = VhpiShard(make_spec(storage=storage, optimizer="sgd", init_scale=0.0))
    local = ops.dedup_ids(torch.arange(rows), torch.tensor([rows]), torch.tensor([0], dtype=torch.int32), 0, 1)

    def add(value: float, step: int) -> None:
        found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
        shard.update(found, torch.full((rows * 12,), -value), None, 1.0, step)

    add(1.5 * start, 1)  # in the middle of an octave
    signed = -start * change if towards_zero else start * change
    for step in range(2, 2 + steps):
        add(signed, step)
    moved = padded(shard, shard.lookup(local.keys, local.tables, local.counts, training=False)).double() - 1.5 * start
    # A rounding goes up or down one unit with mean `change`: its variance is below unit * change. All are independent.
    unit = 2.0**-mantissa
    deviation = (unit * change * steps / moved.numel()) ** 0.5
    assert change < unit / 4
    assert abs(float(moved.mean()) - steps * signed) < 4 * deviation < 0.1 * steps * change
    assert moved.std() > 0.8 * deviation * moved.numel() ** 0.5  # each value on its own: not all rounded by the same bits


def test_a_shard_none_of_whose_keys_are_in_a_step_learns_nothing_and_says_nothing() -> None:
    shard = VhpiShard(make_spec(importance="lookup_norm_sum"))
    keys, tables = keys_of([], [])
    nothing = torch.empty(0, dtype=torch.int32)
    found = shard.lookup(keys, tables, nothing, training=True, step=1)
    shard.update(found, torch.empty(0), torch.empty(0), 0.1, 1)
    shard.update(found, torch.empty(0), torch.empty(0), 0.1, 2, target=nothing)
    assert shard.stats().rows == 0


def test_tables_and_offsets_that_cannot_be_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"feature 1 has table -3|the table of key"):
        ops.dedup_ids(torch.arange(5), torch.tensor([2, 5]), torch.tensor([0, -3], dtype=torch.int32), 0, 1)
    bags = ops.Bags(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64), None, 1, False, 4, 3)
    with pytest.raises(RuntimeError, match="offsets must have"):
        ops.pool(torch.empty(0), torch.empty(0, dtype=torch.uint8), bags)
