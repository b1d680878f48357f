"""What each method keeps and which ids share it, against its source's description; and how many rows a budget leaves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiited_ray.config import Budget, Config, ConfigError, DataConfig, EmbeddingConfig, ModelConfig, PolicyConfig, load
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.data.statistics import mix
from fiited_ray.exchange import Solo
from fiited_ray.fitting import fit_rows, rows_within, settle
from fiited_ray.methods import largest_cap, remainders_of
from fiited_ray.store import ShardSpec, VhpiShard
from fiited_ray.store.layout import dense_row_bytes
from fiited_ray.store.ops import dedup_ids
from fiited_ray.train.loop import Worker

DIM = 12
CONFIG = Config(
    data=DataConfig(categorical=("user",), multi_hot=("seen",)),
    embedding=EmbeddingConfig(dim=DIM, chunk=4, optimizer="sgd", init_scale=0.5),
    policy=PolicyConfig(decay=0.9),
    model=ModelConfig(bottom=(4,), top=(4,)),
)


def changed(method: Any, **embedding: Any) -> Config:
    return dataclasses.replace(CONFIG, method=method, embedding=dataclasses.replace(CONFIG.embedding, **embedding))


def opened(config: Config, budget: int | None = None) -> Worker:
    return Worker(config, budget, Solo(), LocalDecider(config.policy))


def batch_of(users: list[int], seen: list[list[int]]) -> Batch:
    rows = len(users)
    ids = torch.tensor([*users, *(each for bag in seen for each in bag)], dtype=torch.int64)
    ends = np.cumsum([len(bag) for bag in seen])
    return Batch(torch.zeros(rows, 0), torch.zeros(rows), ids, torch.tensor([*range(rows), *(rows + end for end in (0, *ends.tolist()))]))


def vectors_of(worker: Worker, users: list[int], seen: list[list[int]]) -> Tensor:
    """[B, 2, D], with a row made for each id that has none."""
    worker.embedding.train()
    return worker.embedding(batch_of(users, seen)).detach()


def rows_of(worker: Worker) -> dict[tuple[int, int], Tensor]:
    """The store's rows by (table, id)."""
    rows = worker.shard.export_rows()
    values = rows.values.reshape(len(rows.tables), -1)
    return dict(zip(zip(rows.tables.tolist(), rows.raw_ids.tolist(), strict=True), values, strict=True))


# --- rows that are kept by importance: fiited, adaembed, frequency

STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20), st.floats(0.01, 9)), min_size=1, unique_by=lambda each: each[0]),
    min_size=1,
    max_size=5,
)


def survivors(method: str, steps: list[list[tuple[int, int, float]]], threshold: float) -> dict[int, int]:
    """Width by id after steps of (id, number of lookups, norm of the gradient) and a round at the threshold."""
    shard = VhpiShard(ShardSpec.of(changed(method), None))
    for number, step in enumerate(steps, 1):
        ids, counts, norms = (list(each) for each in zip(*step, strict=True))
        ends, tables = torch.tensor([len(ids)]), torch.tensor([0], dtype=torch.int32)
        keys = torch.cat([dedup_ids(torch.tensor([each]), torch.ones_like(ends), tables, 0, 1).keys for each in ids])
        table_of = torch.zeros(len(ids), dtype=torch.int32)
        found = shard.lookup(keys, table_of, torch.tensor(counts, dtype=torch.int32), training=True, step=number)
        gradients = torch.zeros(len(ids), DIM)
        gradients[:, 0] = torch.tensor(norms)
        shard.update(found, gradients.flatten(), None, 0.1, number)
    shard.resize(threshold)
    rows = shard.export_rows()
    return dict(zip(rows.raw_ids.tolist(), rows.widths.tolist(), strict=True))


def expected(steps: list[list[tuple[int, int, float]]], gain: Any) -> dict[int, float]:
    """Decayed sum of what each step gives an id."""
    total: dict[int, float] = {}
    for number, step in enumerate(steps, 1):
        for raw_id, count, norm in step:
            total[raw_id] = total.get(raw_id, 0.0) + gain(count, norm) * CONFIG.policy.decay ** (len(steps) - number)
    return total


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, threshold=st.floats(0.05, 50))
@pytest.mark.parametrize(
    ("method", "gain"),
    [("adaembed", lambda count, norm: count * norm), ("frequency", lambda count, norm: count)],
    ids=["adaembed: frequency x gradient norm", "frequency: number of lookups"],
)
def test_whole_rows_stay_by_the_methods_importance(method: str, gain: Any, steps: list[Any], threshold: float) -> None:
    importance = expected(steps, gain)
    near = {raw_id for raw_id, value in importance.items() if value == pytest.approx(threshold, rel=1e-4)}  # rounding decides
    kept = survivors(method, steps, threshold)
    assert set(kept) - near == {raw_id for raw_id, value in importance.items() if value > threshold} - near
    assert set(kept.values()) <= {1}  # one chunk, of all dimensions


def test_only_fiited_gives_rows_widths_of_their_own() -> None:
    step = [(0, 1, 9.0), (1, 1, 3.0), (2, 1, 1.5), (3, 1, 0.5)]
    assert survivors("fiited", [step], 1.0) == {0: 3, 1: 2, 2: 1}  # alpha 2: cuts at 1, 2 and 4
    assert survivors("adaembed", [step], 1.0) == {0: 1, 1: 1, 2: 1}


# --- rows that are fixed beforehand: hash, qr, uniform


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_hashed_ids_have_the_row_of_their_number_modulo_the_rows(users: list[int]) -> None:
    worker = opened(changed("hash", rows={"user": 7}))
    vectors = vectors_of(worker, users, [[1]] * len(users))[:, 0]
    rows = rows_of(worker)
    assert {raw_id for table, raw_id in rows if table == 0} == {user % 7 for user in users}
    for user, vector in zip(users, vectors, strict=True):
        torch.testing.assert_close(vector, rows[0, user % 7])


def test_a_table_with_a_row_for_each_id_shares_none() -> None:
    worker = opened(changed("hash", rows={"user": 2}))
    vectors_of(worker, [0, 1, 2], [[10, 11], [12], []])
    assert set(rows_of(worker)) == {(0, 0), (0, 1), (1, 10), (1, 11), (1, 12)}


QUOTIENTS, REMAINDERS = 5, 3


def pair_of(raw_id: int) -> tuple[int, int]:
    number = int(mix(np.array([raw_id]).astype(np.uint64))[0]) % (QUOTIENTS * REMAINDERS)
    return divmod(number, REMAINDERS)


@given(st.lists(st.tuples(st.integers(0, 50), st.lists(st.integers(0, 50), max_size=3)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_vector_is_the_product_of_its_quotients_and_its_remainders_rows(rows: list[tuple[int, list[int]]]) -> None:
    worker = opened(changed("qr", rows={"user": QUOTIENTS, "seen": QUOTIENTS}, remainders={"user": REMAINDERS, "seen": REMAINDERS}))
    vectors = vectors_of(worker, [user for user, _ in rows], [seen for _, seen in rows])
    stored = rows_of(worker)
    for (user, seen), vector in zip(rows, vectors, strict=True):
        quotient, remainder = pair_of(user)
        torch.testing.assert_close(vector[0], stored[0, quotient] * stored[2, remainder])
        bags = [torch.stack([stored[table, pair_of(each)[part]] for each in seen]).mean(0) for part, table in ((0, 1), (1, 3)) if seen]
        torch.testing.assert_close(vector[1], bags[0] * bags[1] if bags else torch.zeros(DIM))


def test_both_factors_learn_by_the_products_gradient() -> None:
    config = changed("qr", rows={"user": QUOTIENTS}, remainders={"user": REMAINDERS}, lr=1.0)
    worker = opened(config)
    vectors_of(worker, [4], [[1]])
    before, (quotient, remainder) = rows_of(worker), pair_of(4)
    worker.embedding(batch_of([4], [[1]]))[:, 0].sum().backward()
    after = rows_of(worker)
    torch.testing.assert_close(after[0, quotient], before[0, quotient] - before[2, remainder])
    torch.testing.assert_close(after[2, remainder], before[2, remainder] - before[0, quotient])


def test_a_weight_counts_in_both_factors_of_a_bag() -> None:
    worker = opened(changed("qr", rows={"seen": QUOTIENTS}, remainders={"seen": REMAINDERS}, pooling="sum"))
    plain = batch_of([0, 1], [[4], [4]])
    vectors = worker.embedding.train()(dataclasses.replace(plain, weights=torch.tensor([1.0, 1.0, 1.0, 3.0]))).detach()
    torch.testing.assert_close(vectors[1, 1], 9 * vectors[0, 1])


def test_uniform_rows_have_the_first_dimensions_and_zeros_behind_them() -> None:
    worker = opened(changed("uniform", kept_dim=5))
    vectors = vectors_of(worker, [1, 2], [[3], [4]])
    assert vectors.shape == (2, 2, DIM)
    assert bool((vectors[..., :5] != 0).all())
    assert bool((vectors[..., 5:] == 0).all())
    torch.testing.assert_close(vectors[0, 0, :5], rows_of(worker)[0, 1])


@pytest.mark.parametrize("method", ["hash", "qr", "uniform"])
def test_a_batch_without_rows_is_taken(method: str) -> None:
    worker = opened(changed(method, rows={"user": 3, "seen": 4}, remainders={"user": 2, "seen": 2}, kept_dim=4))
    assert vectors_of(worker, [], []).shape == (0, 2, DIM)


@pytest.mark.parametrize("method", ["fiited", "hash", "qr", "uniform"])
def test_evaluation_reads_the_rows_that_training_would(method: str) -> None:
    """On one worker it makes no list of the distinct ids first."""
    worker = opened(changed(method, rows={"user": 3, "seen": 4}, remainders={"user": 2, "seen": 2}, kept_dim=5))
    vectors_of(worker, [1, 2, 3, 2, 9], [[5, 6], [], [5], [7, 7, 5], [8]])
    batch = batch_of([1, 2, 10_000, 2, 9], [[5, 6], [], [5], [7, 7, 10_001], [8]])  # ids that nobody has met, too
    worker.embedding.eval()
    read = worker.embedding(batch)
    assert read.any(2).any(1).tolist()[:2] == [True, True]
    assert torch.equal(read, worker.embedding(batch, worker.embedding.route(batch)))


@pytest.mark.parametrize("method", ["hash", "qr", "uniform"])
def test_rows_that_were_not_found_yet_are_missed_and_not_guessed(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method {method}: its rows are not known yet"):
        opened(changed(method))


# --- how many rows

COUNTS = st.lists(st.integers(1, 10**7), min_size=1, max_size=30)


@given(COUNTS, st.integers(1, 10**8))
def test_the_cap_is_the_largest_that_fits(ids: list[int], rows: int) -> None:
    cap = largest_cap(ids, rows)
    assert sum(min(count, cap) for count in ids) <= rows
    assert cap == max(ids) or sum(min(count, cap + 1) for count in ids) > rows


@given(st.integers(1, 10**7), st.integers(2, 10**7))
def test_pairs_are_many_enough_with_the_fewest_remainders_or_as_many_as_can_be(ids: int, rows: int) -> None:
    remainders = remainders_of(ids, rows)
    quotients = rows - remainders
    assert quotients >= remainders >= 1
    if quotients * remainders >= 16 * ids:
        assert remainders == 1 or (remainders - 1) * (quotients + 1) < 16 * ids
    else:
        assert remainders == rows // 2


def fitted(method: Any, budget: Budget, distinct: list[int], workers: int = 1) -> tuple[Config, int]:
    config = dataclasses.replace(CONFIG, method=method, budget=budget, train=dataclasses.replace(CONFIG.train, workers=workers))
    config, size = settle(config, distinct)
    assert size is not None
    return config, size


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("method", ["hash", "qr"])
def test_shared_rows_fill_the_budget_and_small_tables_keep_a_row_for_each_id(method: str, workers: int) -> None:
    config, budget = fitted(method, Budget(share=0.3), [200_000, 900], workers)
    rows, remainders = config.embedding.rows or {}, config.embedding.remainders or {}
    assert rows.keys() == {"user"}
    assert remainders.keys() == ({"user"} if method == "qr" else set())
    needed = rows["user"] + remainders.get("user", 0) + 900
    assert 0.95 * rows_within(config, budget) < needed <= rows_within(config, budget)


def test_uniform_takes_as_many_dimensions_as_the_budget_holds() -> None:
    config, budget = fitted("uniform", Budget(share=1.0), [50_000, 50_000])
    kept = config.embedding.kept_dim
    assert kept is not None
    assert 4 <= kept < DIM  # what a row needs beside its vector is counted, too
    longer = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, kept_dim=kept + 1))
    assert rows_within(config, budget) >= 103_000 > rows_within(longer, budget)


@pytest.mark.parametrize(("method", "distinct"), [("uniform", [50_000, 50_000]), ("hash", [50_000] * 2), ("qr", [50_000] * 2)])
def test_a_budget_the_method_cannot_do_with_is_refused_with_the_smallest_one_it_can(method: str, distinct: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"method {method}: .* the smallest budget it can do with here is [0-9,]+ bytes") as raised:
        fit_rows(changed(method), 90_000, distinct)
    smallest = int(str(raised.value).split(" is ")[-1].removesuffix(" bytes").replace(",", ""))
    fit_rows(changed(method), smallest, distinct)
    with pytest.raises(ConfigError):
        fit_rows(changed(method), smallest - 2048, distinct)


@pytest.mark.parametrize("method", ["hash", "qr", "uniform"])
def test_rows_cannot_be_fixed_without_a_budget(method: str) -> None:
    with pytest.raises(ConfigError, match=f"budget: method {method} fixes its rows by it"):
        settle(dataclasses.replace(changed(method), budget=Budget()), [5, 5])


def test_full_width_has_no_budget() -> None:
    assert settle(dataclasses.replace(changed("full"), budget=Budget(bytes=1)), [5, 5]) == (
        dataclasses.replace(changed("full"), budget=Budget(bytes=1)),
        None,
    )


def test_a_share_is_of_full_width_rows_whatever_the_method() -> None:
    for method in ("fiited", "adaembed", "hash", "uniform"):
        assert fitted(method, Budget(share=0.9), [40_000, 40_000])[1] == int(0.9 * 80_000 * dense_row_bytes(CONFIG.embedding))


def test_a_saved_configuration_holds_what_was_found(tmp_path: Path) -> None:
    config, _ = fitted("qr", Budget(share=0.3), [200_000, 900])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    saved = load(tmp_path / "c.yaml")
    assert saved.embedding == config.embedding
    first, again = opened(config), opened(saved)
    vectors = vectors_of(first, [1, 2, 3], [[4], [], [5, 6]])
    addresses, _, _ = first.shard.changed(True)
    again.shard.put(first.shard.take(addresses))
    torch.testing.assert_close(vectors_of(again, [1, 2, 3], [[4], [], [5, 6]]), vectors)
