"""Data that mean harm: each is learned from rightly, refused with its name, or left out and counted; never a crash or a wrong row."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.config import Bin, Config, DataConfig, ModelConfig, TrackingConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, Collator, DataError
from fiited_ray.data.collate import NULL_ID
from fiited_ray.exchange import Solo
from fiited_ray.store.ops import ops
from fiited_ray.store.reference import key_of, mix64
from fiited_ray.train.guards import learn_dense
from fiited_ray.train.loop import Worker, dense_optimizer, train, train_step

MASK = 2**64 - 1
EDGES = [
    0,
    -1,
    1,
    2**63 - 1,
    -(2**63),
    0x5555555555555555,
    -0x5555555555555556,
    *(1 << bit for bit in range(63)),
    *(-(1 << bit) for bit in range(63)),
]


def signed(word: int) -> int:
    return (word & MASK) - (1 << 64) if word & (1 << 63) else word & MASK


def make_worker(budget: int | None = None, not_finite: str = "error", seed: int = 0, lr: float = 0.001) -> Worker:
    config = Config(
        data=DataConfig(dense=("d",), categorical=("a", "b"), bad_rows="skip"),
        seed=seed,
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=1, not_finite=not_finite, debug=True, lr=lr),  # type: ignore[arg-type]
        tracking=TrackingConfig(log_every=1),
    )
    return Worker(config, budget, Solo(), LocalDecider(config.policy))


def overflowing(worker: Worker) -> Worker:
    """The same with a model that turns huge dense values into infinite ones."""
    with torch.no_grad():
        for each in worker.dense.parameters():
            each.mul_(1e4)
    return worker


def lose(worker: Worker, data: Batch) -> None:
    """A step in which the model's last bias is NaN."""
    bias = list(worker.dense.parameters())[-1].data
    before = bias.clone()
    bias.fill_(float("nan"))
    try:
        train_step(worker, data)
    finally:
        bias.copy_(before)


def batch(ids_a: list[int], ids_b: list[int], dense: float = 0.5, label: float | None = None) -> Batch:
    rows = len(ids_a)
    labels = torch.arange(rows) % 2 if label is None else torch.full((rows,), label)
    return Batch(torch.full((rows, 1), dense), labels.float(), torch.tensor([*ids_a, *ids_b]), torch.arange(2 * rows + 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40, unique=True))
def test_ids_of_any_64_bits_have_rows_of_their_own_and_come_back(ids: list[int]) -> None:
    worker = make_worker()
    train_step(worker, batch(ids, ids))
    worker.shard.check()
    rows = worker.shard.export_rows()
    assert sorted(rows.raw_ids[rows.tables == 0].tolist()) == sorted(ids)
    assert sorted(rows.raw_ids[rows.tables == 1].tolist()) == sorted(ids)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.dictionary(pa.int32(), pa.int64()), pa.dictionary(pa.int32(), pa.uint64())])
@pytest.mark.parametrize("column", ["categorical", "multi_hot"])
def test_the_id_that_stands_for_null_is_refused_or_left_out_whatever_holds_it(kind: pa.DataType, column: str) -> None:
    wide = kind.value_type if pa.types.is_dictionary(kind) else kind
    bad = 2**63 if wide == pa.uint64() else NULL_ID
    ids: pa.Array = pa.array([1, bad, None, 4], wide)
    ids = ids.dictionary_encode() if pa.types.is_dictionary(kind) else ids
    if column == "multi_hot":
        ids = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), ids)
    table = pa.table({"label": [0, 1, 0, 1], "x": ids})
    strict = DataConfig(multi_hot=("x",)) if column == "multi_hot" else DataConfig(categorical=("x",))
    with pytest.raises(DataError, match=r"column 'x', row 1: the id -?2\*\*63 stands for a missing value"):
        Collator(strict)(table)
    left = Collator(dataclasses.replace(strict, bad_rows="skip"))(table)
    assert (left.rows, left.skipped) == (3, 1)
    assert left.ids.tolist() == [1, NULL_ID, 4]


def colliding_ids(count: int, seed: int, table: int = 0) -> list[int]:
    """Ids aimed at one bucket, partition, tag and line: what who knows the seed can do."""
    golden = 0x9E3779B97F4A7C15
    before = mix64((seed + golden * (2 * table + 1)) & MASK)
    between = mix64((before + golden) & MASK)

    def unmix(x: int) -> int:
        x = (x ^ (x >> 31) ^ (x >> 62)) * 0x319642B2D24D8EC3 & MASK
        x = (x ^ (x >> 27) ^ (x >> 54)) * 0x96DE1B173F119089 & MASK
        return x ^ (x >> 30) ^ (x >> 60)

    ids = [signed(unmix((unmix(0xABCDEF1200000000 + at) - between) & MASK) ^ before) for at in range(count)]
    assert key_of(ids[3], table, seed) == 0xABCDEF1200000003
    return ids


def test_ids_aimed_at_one_place_of_the_index_by_who_knows_the_seed_keep_rows_of_their_own() -> None:
    worker, ids = make_worker(budget=2_000_000, seed=11), colliding_ids(2000, 11)
    for _ in range(2):
        train_step(worker, batch(ids, [7] * len(ids)))
        worker.shard.check()
    rows = worker.shard.export_rows()
    mine = rows.raw_ids[rows.tables == 0].tolist()
    assert len(mine) == len(set(mine))
    assert set(mine) <= set(ids)
    assert len(mine) > 1000


def test_without_the_seed_nobody_can_aim() -> None:
    ids = torch.tensor(colliding_ids(4000, 11))
    aimed, spread = (ops("cpu").dedup_ids(ids, torch.tensor([4000]), torch.tensor([0], dtype=torch.int32), seed, 8)[4] for seed in (11, 12))
    assert int(aimed.max()) == 4000
    assert int(spread.max()) < 1.3 * 4000 / 8


def test_texts_and_crosses_that_collide_under_one_key_do_not_under_another() -> None:
    """The earlier, unkeyed hash took word by word into 64 bits, so that a second word could undo the first."""
    words = torch.arange(64, dtype=torch.int64)
    hashes = [ops("cpu").cross_ids(words, words.flip(0), seed) for seed in (1, 2)]
    assert not set(hashes[0].tolist()) & set(hashes[1].tolist())
    config = Config(data=DataConfig(categorical=("a", "b")), seed=5)
    assert config.data.seed == 5
    assert dataclasses.replace(config, seed=6).data.seed == 6
    table = pa.table({"label": [0], "a": ["text"], "b": ["text"]})
    one, other = (Collator(dataclasses.replace(config, seed=seed).data)(table).ids for seed in (5, 6))
    assert one[0] == one[1]
    assert one[0] != other[0]


def siphash13_by_the_paper(data: bytes, seed: int) -> int:
    """SipHash-1-3 as its authors write it, with the key that the seed gives."""
    golden = 0x9E3779B97F4A7C15
    k0 = mix64(seed ^ golden)
    k1 = mix64((k0 + golden) & MASK)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) & MASK

    def sip() -> None:
        v[0] = (v[0] + v[1]) & MASK
        v[1] = rotate(v[1], 13) ^ v[0]
        v[0] = rotate(v[0], 32)
        v[2] = (v[2] + v[3]) & MASK
        v[3] = rotate(v[3], 16) ^ v[2]
        v[0] = (v[0] + v[3]) & MASK
        v[3] = rotate(v[3], 21) ^ v[0]
        v[2] = (v[2] + v[1]) & MASK
        v[1] = rotate(v[1], 17) ^ v[2]
        v[2] = rotate(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 255])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        sip()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(3):
        sip()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2**63 - 1))
def test_texts_are_hashed_by_siphash(text: bytes, seed: int) -> None:
    content = torch.tensor(list(text), dtype=torch.uint8)
    found = ops("cpu").hash_strings(torch.tensor([0, len(text)]), content, seed)
    assert int(found[0]) == signed(siphash13_by_the_paper(text, seed))


def test_a_giant_list_is_pooled_whole() -> None:
    ids = list(range(200_000))
    config = Config(data=DataConfig(multi_hot=("m",)), model=ModelConfig("dcnv2", (8,), (8,)), train=TrainConfig(workers=1))
    worker = Worker(config, None, Solo(), LocalDecider(config.policy))
    giant = Batch(torch.zeros(2, 0), torch.tensor([0.0, 1.0]), torch.tensor([*ids, 5]), torch.tensor([0, len(ids), len(ids) + 1]))
    train_step(worker, giant)
    assert worker.shard.stats().rows == len(ids)
    worker.shard.check()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_batches_of_one_id_one_label_and_zeros_are_learned_from(label: float) -> None:
    worker = make_worker(budget=400_000)
    same = [batch([0] * 64, [0] * 64, dense=0.0, label=label)] * 12
    metrics = train(worker, lambda: same)
    assert worker.shard.stats().rows == 2
    assert np.isfinite(worker.losses).all()
    assert np.isnan(metrics["train/auc"])  # of one class it is undefined


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_are_left_out_counted_and_named_in_the_log(value: float, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(dense=("d",), categorical=("a",), cross=(("a", "bin"),), bins={"bin": Bin("e", 1.0)}, bad_rows="skip")
    columns = {"label": [0, 1, 7, 1, None, 0], "d": [value, 1, 1, 1, 1, 1], "e": [1.0, value, 1, 1, 1, 1], "a": [1, 2, 3, 4, 5, 6]}
    faults: list[tuple[int | None, int]] = []
    found = Collator(config)(pa.table(columns), "file", lambda fault, rows: faults.append((fault.row, rows)))
    assert found.labels.tolist() == [1, 0]
    assert found.ids[:2].tolist() == [4, 6]
    assert found.skipped == 4
    assert sorted(faults) == [(0, 1), (1, 1), (2, 1), (4, 1)]  # rows as they were given


def test_rows_that_were_left_out_are_in_the_metrics_of_a_run() -> None:
    batches = [dataclasses.replace(batch([1, 2], [3, 4]), skipped=skipped) for skipped in (0, 3, 4)]
    worker = make_worker()
    assert train(worker, lambda: batches)["data/skipped_rows"] == 7
    assert worker.history.values["data/skipped_rows"].tolist() == [0, 3, 7]


def test_rows_that_were_left_out_of_the_test_set_are_in_its_metrics() -> None:
    worker = make_worker()
    scored = [dataclasses.replace(batch([1, 2], [3, 4]), skipped=skipped) for skipped in (2, 0, 5)]
    metrics = train(worker, lambda: [batch([1, 2], [3, 4])], lambda: scored)
    assert (metrics["eval/skipped_rows"], metrics["data/skipped_rows"]) == (7, 0)


def test_a_batch_without_rows_has_no_loss_that_would_look_like_a_good_one() -> None:
    worker = make_worker()
    nothing = Batch(torch.zeros(0, 1), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), skipped=2)
    train(worker, lambda: [batch([1, 2], [3, 4]), nothing, batch([1, 2], [3, 4])])
    assert np.isnan(worker.losses).tolist() == [False, True, False]
    assert worker.history.values["data/skipped_rows"].tolist() == [0, 2, 2]


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("not_finite", ["skip", "error"])
def test_a_dense_gradient_whose_square_is_infinite_is_not_learned_from(optimizer: str, not_finite: str) -> None:
    worker = make_worker(not_finite=not_finite)
    worker.optimizer = dense_optimizer(
        dataclasses.replace(worker.config, train=dataclasses.replace(worker.config.train, optimizer=optimizer)),  # type: ignore[arg-type]
        [worker.parameters],
    )
    train_step(worker, batch([1, 2], [3, 4]))
    before = worker.parameters.detach().clone()
    worker.gradient[3] = 1e25
    if not_finite == "error":
        with pytest.raises(ValueError, match=r"step 1: the dense parameters' gradient reaches 1e\+25; 1e\+12 can be learned from"):
            learn_dense(worker)
    else:
        learn_dense(worker)
        assert worker.skipped.steps == 1
    assert torch.equal(worker.parameters.detach(), before)
    state = next(iter(worker.optimizer.state.values()))
    assert all(bool(each.isfinite().all()) for each in state.values())


def test_a_batch_of_bad_rows_alone_is_an_empty_one() -> None:
    config = DataConfig(dense=("d",), categorical=("a",), bad_rows="skip")
    found = Collator(config)(pa.table({"label": [0, 1], "d": [np.nan, np.inf], "a": [1, 2]}))
    assert (found.rows, found.skipped) == (0, 2)
    found.validate(config.features, config.dense)


def test_a_loss_that_is_not_finite_ends_the_run_before_any_row_learns() -> None:
    worker = overflowing(make_worker())
    train_step(worker, batch([1, 2], [3, 4]))
    before = worker.shard.export_rows().tensors()
    with pytest.raises(ValueError, match=r"step 2: the model's logit for row 0 of worker 0's batch is (nan|inf|-inf); look for huge"):
        lose(worker, batch([1, 2], [3, 4]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in worker.shard.export_rows().tensors().items())


def test_a_step_without_a_finite_loss_is_skipped_counted_and_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    worker = overflowing(make_worker(not_finite="skip"))
    good, bad = batch([1, 2], [3, 4]), batch([1, 2], [3, 4], dense=3e38)
    train_step(worker, good)
    dense = [each.detach().clone() for each in worker.dense.parameters()]
    rows = worker.shard.export_rows()
    with caplog.at_level(logging.WARNING):
        lose(worker, good)
    assert "the step is skipped" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(dense, worker.dense.parameters(), strict=True))
    assert torch.equal(rows.values, worker.shard.export_rows().values)
    metrics = train(worker, lambda: [good, bad, good])
    assert metrics["train/skipped_steps"] == 2
    assert np.isfinite([metrics["train/loss"]]).all()


def test_nothing_but_bad_steps_is_an_error() -> None:
    worker = overflowing(make_worker(not_finite="skip"))
    with pytest.raises(ValueError, match="100 steps in a row had no finite loss"):
        train(worker, lambda: [batch([1, 2], [3, 4], dense=3e38)] * 101)


def test_a_bag_whose_gradient_is_not_finite_teaches_nothing_and_is_counted() -> None:
    worker = make_worker(not_finite="skip")
    data = batch([1, 2], [3, 4])
    vectors = worker.embedding(data)
    before = worker.shard.export_rows()
    strength = torch.ones_like(vectors)
    strength[0, 0, 5] = float("inf")  # row 0's bag of the first feature: id 1
    (vectors * strength).sum().backward()
    after = worker.shard.export_rows()
    changed = (before.values != after.values).reshape(4, -1).any(1)
    assert dict(zip(after.raw_ids.tolist(), changed.tolist(), strict=True)) == {1: False, 2: True, 3: True, 4: True}
    assert worker.embedding.skipped_bags == 1


def test_a_check_names_the_row_and_what_is_wrong_with_it() -> None:
    worker = make_worker()
    worker.embedding.lr = 3e38
    for _ in range(2):
        worker.embedding(batch([77], [3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"the row of table 0, id 77 \(width 4\): dimension 0 of its vector is -?inf"):
        worker.shard.check()
