"""Counting distinct ids: the sketch alone, and over files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.config import Bin, DataConfig
from fiited_ray.data import DataError, check_files, count_distinct
from fiited_ray.data.statistics import DistinctSketch


def sketch_of(count: int, seed: int = 0, table: int = 0) -> DistinctSketch:
    sketch = DistinctSketch()
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, count)
    sketch.add(keys, np.full(count, table, np.int32))
    return sketch


def write(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    return str(path)


@pytest.mark.parametrize("count", [0, 1, 2, 10])
def test_a_few_ids_are_counted_exactly(count: int) -> None:
    assert sketch_of(count).estimate() == count


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_ids_are_counted_to_within_two(seed: int) -> None:
    assert sketch_of(100, seed).estimate() == pytest.approx(100, abs=2)  # two of them seldom meet in one of 16,384 registers


# 40,000 lies where the textbook estimator changes its formula and is up to 4 % off.
@pytest.mark.parametrize("count", [1_000, 20_000, 40_000, 60_000, 100_000, 1_000_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_estimate_is_within_two_percent(count: int, seed: int) -> None:
    assert sketch_of(count, seed).estimate() == pytest.approx(count, rel=0.02)


def test_the_estimate_is_unbiased_where_registers_begin_to_fill_up() -> None:
    errors = [sketch_of(40_000, seed).estimate() / 40_000 - 1 for seed in range(20)]
    assert abs(np.mean(errors)) < 0.006  # three standard errors of the mean


def test_consecutive_numbers_are_counted_as_well_as_random_ones() -> None:
    sketch = DistinctSketch()
    sketch.add(np.arange(100_000), np.zeros(100_000, np.int32))
    assert sketch.estimate() == pytest.approx(100_000, rel=0.02)


def test_seeing_ids_again_changes_nothing() -> None:
    once, twice = sketch_of(5000), sketch_of(5000)
    twice.add(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 5000), np.zeros(5000, np.int32))
    assert (once.registers == twice.registers).all()


def test_the_order_and_the_cut_of_the_stream_do_not_matter() -> None:
    keys = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 5000)
    whole, pieces = DistinctSketch(), DistinctSketch()
    whole.add(keys, np.zeros(5000, np.int32))
    for piece in np.array_split(keys[::-1], 7):
        pieces.add(piece, np.zeros(len(piece), np.int32))
    assert (whole.registers == pieces.registers).all()


def test_the_same_id_in_two_tables_counts_twice() -> None:
    sketch = sketch_of(50)
    sketch.add(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50), np.ones(50, np.int32))
    assert sketch.estimate() == pytest.approx(100, abs=2)


def test_ids_of_all_kinds_of_features_are_counted_once_over_several_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    users, prices = random.integers(0, 40, 6000), random.integers(0, 100, 6000).astype(float)
    words = [[f"w{number}" for number in random.integers(0, 30, length)] for length in random.integers(0, 4, 6000)]
    halves = [slice(0, 3000), slice(3000, 6000)]
    paths = [
        write(tmp_path / f"{at}.parquet", label=np.zeros(3000, int), user=users[half], price=prices[half], words=words[half])
        for at, half in enumerate(halves)
    ]
    bins = {"band": Bin("price", 10.0)}
    config = DataConfig(train=tuple(paths), categorical=("user", "band"), multi_hot=("words",), cross=(("user", "band"),), bins=bins)
    exact = [40, 10, 30, len(set(zip(users.tolist(), (prices // 10).tolist(), strict=True)))]
    assert count_distinct(check_files(config.train, config), config) == pytest.approx(exact, rel=0.01, abs=1)


def test_a_null_is_an_id_and_a_shared_table_counts_an_id_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[0, 1, 0], a=[1, 2, None], b=[2, 3, 3])
    apart = DataConfig(train=(path,), categorical=("a", "b"))
    shared = DataConfig(train=(path,), categorical=("a", "b"), shared_tables={"both": ("a", "b")})
    files = check_files((path,), apart)
    assert count_distinct(files, apart) == [3, 2]  # 1, 2, null; 2, 3
    assert count_distinct(files, shared) == [4]  # 1, 2, 3, null


def test_only_the_rows_that_will_be_read_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[0] * 5000, a=list(range(5000)))
    config = DataConfig(train=(path,), categorical=("a",))
    assert count_distinct(check_files((path,), config), config, max_rows=70) == pytest.approx([70], abs=2)


def test_rows_that_are_not_in_the_order_of_time_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[0, 1, 0], a=[1, 2, 1], t=[3, 1, 2])
    config = DataConfig(train=(path,), categorical=("a",), time="t", reader="ray")
    assert count_distinct(check_files((path,), config), config) == [2]


def test_a_stretch_of_nothing_but_bad_rows_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[7] * 65536 + [0, 1], a=[1] * 65536 + [2, 3])
    config = DataConfig(train=(path,), categorical=("a",), bad_rows="skip")
    files = check_files((path,), config)
    assert count_distinct(files, config) == [2]
    with pytest.raises(DataError, match=r"a\.parquet: data\.bad_rows=skip leaves out every one of 70 rows; take error to see"):
        count_distinct(files, config, max_rows=70)
