"""What the store gives out to be saved, as its plain-Python twin has it: the rows that changed, at their addresses, and the sketch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import fold, learn, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.store import Rows, VhpiShard, ops
from fiited_ray.store.layout import buckets_of
from fiited_ray.store.reference import ReferenceShard, key_of


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), decay=st.sampled_from([1.0, 0.9, 0.2]))
def test_all_rows_that_changed_in_the_twin_are_given_out_and_sketches_are_equal(seed: int, decay: float) -> None:
    spec = make_spec(decay=decay, importance="frequency")
    shard, twin = VhpiShard(spec), ReferenceShard(spec)
    random = np.random.default_rng(seed)
    held: dict[int, tuple[int, int, bytes]] = {}  # by address: what all changes up to now say of it
    for step in range(1, 20):
        ids = torch.from_numpy(random.zipf(1.3, 60) % 300)
        local = ops.dedup_ids(ids, torch.tensor([30, 60]), torch.tensor([0, 1], dtype=torch.int32), spec.seed, 1)
        gradient = torch.from_numpy(random.integers(-3, 4, (local.keys.numel(), spec.dim))).float()
        for each in (shard, twin):
            found = each.lookup(local.keys, local.tables, local.counts, training=True, step=step)
            each.update(found, fold(gradient, found.widths, spec), None, 0.05, step)
        if random.random() < 0.4:
            threshold = float(np.float32(random.choice([0.3, 2.0, 20.0])))
            shard.resize(threshold)
            twin.resize(threshold)
        if random.random() < 0.4:
            addresses, ends, counts = shard.changed(False, most=20)
            assert int(counts.sum()) == len(addresses)
            rows = shard.take(addresses)
            ids_given = list(zip(rows.tables.tolist(), rows.raw_ids.tolist(), strict=True))
            keys = {(key_of(raw, table, spec.seed), table) for table, raw in ids_given}
            assert twin.take_changed() <= keys
            buckets = buckets_of(rows.raw_ids.numpy(), rows.tables.numpy(), spec.seed)
            assert_pieces(buckets, ends.tolist(), counts.tolist(), 20)
            parts = rows.values.split((rows.widths.long() * spec.chunk).tolist())
            for address, ident, vector in zip(addresses.tolist(), ids_given, parts, strict=True):
                held[address] = (*ident, vector.numpy().tobytes())
            everything, _, _ = shard.changed(True)
            now = shard.take(everything)
            vectors = now.values.split((now.widths.long() * spec.chunk).tolist())
            for address, table, raw, vector in zip(everything.tolist(), now.tables.tolist(), now.raw_ids.tolist(), vectors, strict=True):
                assert held[address] == (table, raw, vector.numpy().tobytes())
    cells, base = twin.sketch_cells()
    assert torch.equal(shard.sketch()[0].sort(1)[0], cells.cpu().sort(1)[0])  # a round hands rows back in an order of its own
    assert shard.state()[2] == base


def test_what_was_given_out_is_not_given_out_again_until_it_changes() -> None:
    shard = VhpiShard(make_spec())
    learn(shard, list(range(50)), torch.ones(50, 12), 1)
    assert len(shard.changed(False)[0]) == 50
    assert len(shard.changed(False)[0]) == 0
    learn(shard, [7], torch.ones(1, 12), 2)
    addresses, ends, counts = shard.changed(False)
    assert shard.take(addresses).raw_ids.tolist() == [7]
    assert (ends.tolist(), counts.tolist()) == ([1024], [1])
    assert len(shard.changed(True)[0]) == 50


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("placed", [True, False])
def test_rows_come_back_bit_for_bit(optimizer: str, storage: str, placed: bool) -> None:
    spec = make_spec(optimizer=optimizer, storage=storage, importance="norm", decay=0.9)
    shard, again = VhpiShard(spec), VhpiShard(spec)
    learn(shard, list(range(300)), torch.logspace(-3, 3, 300)[:, None].expand(300, 12), 3)
    shard.resize(0.5)
    addresses, _, _ = shard.changed(True)
    rows = shard.take(addresses)
    assert len(set(rows.widths.tolist())) == 3
    again.restore(shard.state(), shard.threshold)
    if placed:
        again.reserve(shard.rows_by_width().sum(0).tolist())
    order = torch.randperm(len(addresses), generator=torch.Generator().manual_seed(0)).cpu()
    again.put(pick(rows, order, spec.chunk, spec.state_sizes()), addresses[order], placed)
    again.seal()
    again.check()
    for name, tensor in shard.export_rows().tensors().items():
        assert torch.equal(tensor, again.export_rows().tensors()[name]), name
    assert again.state() == shard.state()
    if placed:
        for name, tensor in rows.tensors().items():
            assert torch.equal(tensor, again.take(addresses).tensors()[name]), name


def pick(rows: Rows, order: torch.Tensor, chunk: int, state_sizes: torch.Tensor) -> Rows:
    """The rows in another order."""
    widths = rows.widths.long()
    values = rows.values.split((widths * chunk).tolist())
    state = rows.state.split(state_sizes[widths].tolist())
    return Rows(
        *(tensor[order] for tensor in (rows.raw_ids, rows.tables, rows.widths, rows.importance)),
        torch.cat([values[at] for at in order.tolist()]),
        torch.cat([state[at] for at in order.tolist()]),
    )


def test_a_shard_that_no_threshold_has_held_for_long_comes_back() -> None:
    """Each octave of decay lowers the base of the sketch's levels, and only a threshold sets it anew."""
    shard = VhpiShard(make_spec())
    for step in (1, 5_000, 50_000):  # 7600 octaves at a decay of 0.9
        learn(shard, [1, 2], torch.ones(2, 12), step)
    state, (cells, registers) = shard.state(), shard.sketch()
    again = VhpiShard(make_spec())
    again.restore(state, 0.0)
    again.put_sketch(0, cells, state[2], registers)
    assert again.state() == state


def test_a_load_into_a_shard_with_rows_is_refused() -> None:
    shard = VhpiShard(make_spec())
    learn(shard, [1], torch.ones(1, 12), 1)
    with pytest.raises(RuntimeError, match="restore: there are rows in the store already"):
        shard.restore(shard.state(), 0.0)


def test_a_place_that_nothing_came_to_is_told() -> None:
    shard = VhpiShard(make_spec())
    shard.reserve([1, 0, 0])
    with pytest.raises(RuntimeError, match="row 0 of width 1 never came"):
        shard.seal()


def held() -> tuple[Rows, torch.Tensor]:
    """Rows of all widths, more than fit into one piece of any device's, and their addresses."""
    shard = VhpiShard(make_spec(optimizer="adagrad", importance="norm"))
    learn(shard, list(range(300)), torch.logspace(-3, 3, 300)[:, None].expand(300, 12), 1)
    shard.resize(0.005)
    addresses, _, _ = shard.changed(True)
    return shard.take(addresses), addresses


def put_refused(rows: Rows, addresses: torch.Tensor | None = None, **changes: Any) -> str:
    shard = VhpiShard(make_spec(optimizer="adagrad", importance="norm", **changes))
    if addresses is not None:
        shard.reserve(rows.widths.bincount(minlength=4)[1:].tolist())
    with pytest.raises(RuntimeError) as error:
        shard.put(rows, addresses, addresses is not None)
    return str(error.value)


def named(rows: Rows, at: int) -> str:
    return f"row {at} (table {int(rows.tables[at])}, id {int(rows.raw_ids[at])}) "


def test_rows_of_another_shard_are_refused() -> None:
    rows, _ = held()
    buckets = buckets_of(rows.raw_ids.numpy(), rows.tables.numpy(), 0)
    assert put_refused(rows, end_bucket=900).endswith(named(rows, int(np.argmax(buckets >= 900))) + "belongs to another shard")


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_are_refused_by_their_first_row(odd: float) -> None:
    rows, _ = held()
    starts = (rows.widths.long() * 4).cumsum(0)
    rows.values[starts[[200, 230]] - 1] = odd
    assert put_refused(rows).endswith(named(rows, 200) + "has a value that is not finite")


def test_nan_in_the_state_is_refused() -> None:
    rows, _ = held()
    rows.state[(rows.widths.long() * 4).cumsum(0)[[150, 151]] - 1] = float("nan")
    assert put_refused(rows).endswith(named(rows, 150) + "has NaN in its optimizer state")


@pytest.mark.parametrize(("at", "before"), [(250, 249), (250, 3)])
def test_a_row_that_is_there_is_refused(at: int, before: int) -> None:
    rows, _ = held()
    rows.raw_ids[at] = rows.raw_ids[before]
    assert put_refused(rows).endswith(named(rows, at) + "is already in the store")


def test_addresses_that_cannot_be_are_refused() -> None:
    rows, addresses = held()
    assert len(set(rows.widths.tolist())) == 3
    none, same, far, doubled = (addresses.clone() for _ in range(4))
    none[170] = -1
    assert put_refused(rows, none).endswith(named(rows, 170) + "has an address that is none of its width")
    other = int((rows.widths != rows.widths[20]).nonzero()[0, 0])
    same[20] = addresses[other]
    assert put_refused(rows, same).endswith(named(rows, 20) + "has an address that is none of its width")
    far[30] += 1000
    assert put_refused(rows, far).endswith(named(rows, 30) + "has an address that is none of its width")
    alike = (rows.widths == rows.widths[0]).nonzero()[:, 0]
    for later in (int(alike[1]), int(alike[-1])):  # of one piece, and of another
        doubled = addresses.clone()
        doubled[later] = addresses[0]
        assert put_refused(rows, doubled).endswith(named(rows, later) + "has the address of another row")


def test_of_several_faults_the_first_rows_is_named() -> None:
    rows, addresses = held()
    rows.state[(rows.widths.long() * 4).cumsum(0)[20] - 1] = float("nan")
    rows.raw_ids[20] = rows.raw_ids[3]
    rows.values[(rows.widths.long() * 4).cumsum(0)[21] - 1] = float("nan")
    addresses[22] = -1
    assert put_refused(rows, addresses).endswith(named(rows, 20) + "has NaN in its optimizer state")


def test_rows_that_find_no_room_are_refused() -> None:
    rows, _ = held()
    shard = VhpiShard(make_spec(optimizer="adagrad", importance="norm"))
    per_row = torch.tensor(shard.spec.plan()[1])[rows.widths.long()]
    limit = shard.stats().planned + int(per_row[:123].sum())
    shard.set_limit(limit)
    with pytest.raises(RuntimeError) as error:
        shard.put(rows)
    assert str(error.value).endswith(named(rows, 123) + f"does not fit into the limit of {limit} bytes")


def test_room_that_no_machine_has_is_refused() -> None:
    for rows in (-1, 1 << 40, 1 << 62):
        with pytest.raises(RuntimeError, match=f"there is no memory for {rows} rows of width 2"):
            VhpiShard(make_spec()).reserve([0, rows, 0])


def test_an_address_without_a_row_is_not_taken() -> None:
    shard = VhpiShard(make_spec())
    learn(shard, [1, 2], torch.ones(2, 12), 1)
    for address in (-1, 0):  # a place of width 1: both rows have full width
        with pytest.raises(RuntimeError, match=f"no row stands at address {address % 2**32}"):
            shard.take(torch.tensor([address], dtype=torch.int32, device="cpu"))


def assert_pieces(buckets: np.ndarray, ends: list[int], counts: list[int], most: int) -> None:
    """Each row is in the piece of its bucket, and no piece has more rows than it may, nor fewer than it can."""
    assert ends[-1] == 1024
    assert (np.diff(ends) > 0).all()
    in_bucket, first, parts = np.bincount(buckets, minlength=1024), 0, np.split(buckets, np.cumsum(counts)[:-1])
    for at, (end, part) in enumerate(zip(ends, parts, strict=True)):
        assert ((part >= first) & (part < end)).all()
        assert len(part) == in_bucket[first:end].sum()
        assert len(part) <= most or np.count_nonzero(in_bucket[first:end]) == 1
        assert end == 1024 or len(part) + in_bucket[end] > most
        first = end
        assert len(part) > 0 or (at, ends) == (0, [1024])


def test_a_bucket_with_more_rows_than_a_piece_may_have_is_a_piece() -> None:
    shard = VhpiShard(make_spec())
    ids = torch.arange(60_000)
    raw = ids[buckets_of(ids.numpy(), np.zeros(len(ids), np.int32), shard.spec.seed) == 700][:30].tolist()
    learn(shard, [*raw, 1, 2], torch.ones(32, 12), 1)
    addresses, ends, counts = shard.changed(True, most=10)
    rows = shard.take(addresses)
    assert_pieces(buckets_of(rows.raw_ids.numpy(), rows.tables.numpy(), shard.spec.seed), ends.tolist(), counts.tolist(), 10)
    assert max(counts.tolist()) == 30


def test_a_store_without_rows_is_one_piece_without_rows() -> None:
    addresses, ends, counts = VhpiShard(make_spec()).changed(True, most=1)
    assert (addresses.numel(), ends.tolist(), counts.tolist()) == (0, [1024], [0])


def test_buckets_of_ids_are_those_of_their_keys() -> None:
    raw = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    for seed in (0, 5, 2**63 + 5):
        for table in (0, 1, 70):
            expected = [key_of(each, table, seed) >> 54 for each in raw.tolist()]
            assert buckets_of(raw.numpy(), np.full(len(raw), table, np.int32), seed).tolist() == expected
