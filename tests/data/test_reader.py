"""Both ways from Parquet to batches: the same rows in the same order for any number of workers, each row exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch

from fiited_ray.config import DataConfig
from fiited_ray.data import Batch, DataError, check_files, parquet_batches, ray_batches, ray_dataset, reader
from fiited_ray.data.files import Files, is_sorted

CONFIG = DataConfig(dense=("d",), categorical=("row",), multi_hot=("tags",), cross=(("row", "word"),))
TIMED = DataConfig(categorical=("row",), time="t")
ROWS = 103


def table(begin: int, end: int) -> pa.Table:
    rows = np.arange(begin, end)
    return pa.table(
        {
            "label": rows % 2,
            "d": rows / 4,
            "row": rows,
            "word": [f"w{row % 5}" for row in rows],
            "tags": [list(range(row % 4)) for row in rows],
            "t": rows * 10,
        }
    )


def write(folder: Path, *bounds: int, config: DataConfig = CONFIG, group: int = 16) -> Files:
    """Rows bounds[0] to bounds[-1], cut into files at the bounds."""
    paths = []
    for at, (begin, end) in enumerate(pairwise(bounds)):
        paths.append(str(folder / f"part-{at:02}.parquet"))
        pq.write_table(table(begin, end), paths[-1], row_group_size=group)
    return check_files(tuple(paths), config)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write(tmp_path, 0, 37, 40, ROWS)


def whole_iterator(files: Files, config: DataConfig, max_rows: int | None = None) -> ray.data.DataIterator:
    """The iterator of the whole data set in order, as Ray Train hands it out."""
    dataset = ray_dataset(files, config, max_rows)
    dataset.context.execution_options.preserve_order = True
    shard: ray.data.DataIterator = dataset.materialize().iterator()
    return shard


def rows_of(batches: Iterator[Batch]) -> list[list[int]]:
    """The row numbers of each batch."""
    return [batch.ids[: batch.rows].tolist() for batch in batches]


def all_rows(batches: Iterator[Batch]) -> list[int]:
    return [row for rows in rows_of(batches) for row in rows]


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("dense", "labels", "ids", "offsets"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("limit", "most"), [("_TOGETHER", 1), ("_TOGETHER", 20), ("_TOGETHER", 45), ("_TOGETHER_VALUES", 150)])
def test_batches_are_the_same_however_many_are_collated_together(
    files: Files, limit: str, most: int, workers: int, first_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(rank: int) -> list[Batch]:
        return list(parquet_batches(files, CONFIG, 10, rank=rank, workers=workers, first_step=first_step, max_rows=98))

    all_at_once = [read(rank) for rank in range(workers)]
    monkeypatch.setattr(reader, limit, most)
    for rank, batches in enumerate(all_at_once):
        for one, other in zip(batches, read(rank), strict=True):
            assert_same(one, other)


def test_a_batch_may_reach_from_a_file_that_may_hold_nulls_into_one_that_may_not(tmp_path: Path) -> None:
    for name, begin, end, nullable in (("a", 0, 15, True), ("b", 15, 40, False)):
        rows = table(begin, end)
        pq.write_table(rows.cast(pa.schema([field.with_nullable(nullable) for field in rows.schema])), tmp_path / f"{name}.parquet")
    files = check_files((str(tmp_path),), CONFIG)
    assert all_rows(parquet_batches(files, CONFIG, 10)) == list(range(40))


def test_as_many_whole_batches_are_read_together_as_their_values_allow(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = pq.read_metadata(files.paths[0])
    monkeypatch.setattr(reader, "_TOGETHER", 95)
    assert reader.rows_at_once(metadata, CONFIG.columns, 10) == 90
    assert reader.rows_at_once(metadata, CONFIG.columns, 100) == 100  # one, however large
    monkeypatch.setattr(reader, "_TOGETHER_VALUES", 200)  # 16 rows have 4 x 16 values, and 24 in lists, of which 4 are empty
    assert reader.rows_at_once(metadata, CONFIG.columns, 10) == 10 * (200 * 16 // (64 + 24 + 4) // 10)
    assert reader.rows_at_once(metadata, ["label", "row"], 10) == 90


@pytest.mark.parametrize(
    ("limit", "most", "taken"), [("_TOGETHER", 20, [2, 1]), ("_TOGETHER", 19, [1, 1, 1]), ("_TOGETHER_VALUES", 1, [1, 1, 1])]
)
def test_tables_of_ray_are_put_together_likewise(limit: str, most: int, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, limit, most)
    together = list(reader._sliced([table(0, 10), table(10, 20), table(20, 25)], 1, 2))
    assert [len(each.ends) for each in together] == taken
    assert [row for each in together for row in each.table["row"].to_pylist()] == [*range(5, 10), *range(15, 20), *range(22, 25)]
    assert [begin for each in together for begin in each.begins] == [5, 5, 2]
    assert together[-1].ends == [3]


@pytest.mark.parametrize("together", [1, 40, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_left_out_is_its_batchs_however_many_are_collated_together(
    tmp_path: Path, together: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_TOGETHER", together)
    files, config = write_bad_label(tmp_path), dataclasses.replace(CONFIG, bad_rows="skip")
    parts = [list(parquet_batches(files, config, 16, rank=rank, workers=workers)) for rank in range(workers)]
    assert [sum(part[step].skipped for part in parts) for step in range(3)] == [0, 1, 0]
    steps = [[row for part in step for row in part] for step in zip(*map(rows_of, parts), strict=True)]
    assert [row for step in steps for row in step] == [row for row in range(40) if row != 30]
    assert [len(step) for step in steps] == [16, 15, 8]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 103, 500])
def test_workers_together_read_every_row_once_in_order(files: Files, workers: int, batch_size: int) -> None:
    parts = [rows_of(parquet_batches(files, CONFIG, batch_size, rank=rank, workers=workers)) for rank in range(workers)]
    assert len({len(part) for part in parts}) == 1
    steps = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
    assert steps == [list(range(begin, min(begin + batch_size, ROWS))) for begin in range(0, ROWS, batch_size)]


def test_the_slices_of_a_global_batch_differ_by_a_row_at_most(files: Files) -> None:
    parts = [[len(rows) for rows in rows_of(parquet_batches(files, CONFIG, 10, rank=rank, workers=3))] for rank in range(3)]
    assert all(max(step) - min(step) <= 1 for step in zip(*parts, strict=True))


def test_a_last_batch_shorter_than_the_workers_leaves_some_without_rows(tmp_path: Path) -> None:
    files = write(tmp_path, 0, 11)
    last = [list(parquet_batches(files, CONFIG, 10, rank=rank, workers=3))[-1] for rank in range(3)]
    assert [batch.rows for batch in last] == [0, 0, 1]
    assert last[0].offsets.tolist() == [0]
    for batch in last:
        batch.validate(CONFIG.features, CONFIG.dense)


def test_ray_and_direct_reading_give_identical_batches_to_one_two_and_three_workers(ray_local: None, files: Files) -> None:
    shard = whole_iterator(files, CONFIG)
    for rank, workers in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        direct = list(parquet_batches(files, CONFIG, 20, rank=rank, workers=workers))
        through_ray = list(ray_batches(shard, CONFIG, 20, rank, workers, total=ROWS))
        assert len(direct) == len(through_ray) == 6
        for one, other in zip(direct, through_ray, strict=True):
            assert_same(one, other)


def test_ray_reads_files_in_the_order_named(ray_local: None, tmp_path: Path) -> None:
    files = write(tmp_path, 0, 30, 60)
    turned = Files(files.paths[::-1], files.rows[::-1], False)
    expected = [*range(30, 60), *range(30)]
    assert all_rows(parquet_batches(turned, CONFIG, 25)) == expected
    assert all_rows(ray_batches(whole_iterator(turned, CONFIG), CONFIG, 25, 0, 1, total=60)) == expected


def test_ray_keeps_the_order_of_a_files_row_groups(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DATA_PARQUET_BIN_PACKING_BYTES", "1000")  # Ray's own source would emit the last bin of row groups first
    files = write(tmp_path, 0, ROWS)
    assert all_rows(ray_batches(whole_iterator(files, CONFIG), CONFIG, 25, 0, 1, total=ROWS)) == list(range(ROWS))


@pytest.mark.parametrize(
    "names",
    [("a.pq", "b.parquet"), ("_a.parquet",), ("a.parquet", "a.parquet"), ("row=7/a.parquet",)],
    ids=["suffix", "_", "twice", "hive"],
)
def test_ray_reads_every_file_as_it_stands_whatever_its_name(ray_local: None, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(0, 10), tmp_path / name)
    files = check_files(tuple(str(tmp_path / name) for name in names), CONFIG)
    rows = all_rows(ray_batches(whole_iterator(files, CONFIG), CONFIG, 8, 0, 1, total=files.total_rows))
    assert rows == list(range(10)) * len(names)


def test_rows_that_do_not_come_through_ray_are_an_error(ray_local: None, files: Files) -> None:
    batches = ray_batches(whole_iterator(files, CONFIG), CONFIG, 20, 0, 1, total=ROWS + 1)
    with pytest.raises(DataError, match=r"data\.reader=ray: 103 rows came of the 104 in the files; read them with data\.reader=arrow"):
        list(batches)


@pytest.mark.parametrize("max_rows", [1, 37, 39, 64, 1000])
def test_max_rows_stops_after_so_many_rows(files: Files, max_rows: int) -> None:
    rows = all_rows(parquet_batches(files, CONFIG, 10, max_rows=max_rows))
    assert rows == list(range(min(max_rows, ROWS)))


def test_max_rows_is_the_same_through_ray(ray_local: None, files: Files) -> None:
    assert all_rows(ray_batches(whole_iterator(files, CONFIG, 39), CONFIG, 10, 0, 1, total=39)) == list(range(39))


def test_reading_without_a_thread_gives_the_same_batches(files: Files) -> None:
    pairs = zip(parquet_batches(files, CONFIG, 20), parquet_batches(files, CONFIG, 20, prefetch=False), strict=True)
    for one, other in pairs:
        assert_same(one, other)


def test_a_file_in_time_order_is_read_as_it_is(tmp_path: Path) -> None:
    files = write(tmp_path, 0, 50, ROWS, config=TIMED)
    assert is_sorted(files, "t")
    assert all_rows(parquet_batches(files, TIMED, 16)) == list(range(ROWS))


@pytest.mark.parametrize("kind", ["within a row group", "between files"])
def test_an_unsorted_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    files = write(tmp_path, 0, 50, ROWS, config=TIMED)
    culprit = files.paths[1]
    if kind == "within a row group":
        rows = table(50, ROWS)
        pq.write_table(pa.concat_tables([rows.slice(0, 3), rows.slice(4), rows.slice(3, 1)]), culprit)
    else:
        files, culprit = Files(files.paths[::-1], files.rows[::-1], False), files.paths[0]
    assert not is_sorted(files, "t")
    with pytest.raises(DataError, match=rf"{culprit}: not in the order of 't' near row \d+; sort the files by it, or leave data\.time out"):
        list(parquet_batches(files, TIMED, 16))


def test_equal_times_are_in_order(tmp_path: Path) -> None:
    pq.write_table(table(0, 40).set_column(5, "t", pa.array(np.arange(40) // 20)), tmp_path / "a.parquet", row_group_size=8)
    files = check_files((str(tmp_path / "a.parquet"),), TIMED)
    assert is_sorted(files, "t")
    assert len(all_rows(parquet_batches(files, TIMED, 16))) == 40


def test_ray_sorts_an_unsorted_file_by_time(ray_local: None, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    pq.write_table(table(0, ROWS).take(pa.array(order)), tmp_path / "a.parquet", row_group_size=16)
    files = check_files((str(tmp_path / "a.parquet"),), TIMED)
    assert all_rows(ray_batches(whole_iterator(files, TIMED), TIMED, 16, 0, 1, total=ROWS)) == list(range(ROWS))


def test_rows_of_one_time_keep_their_order_every_time_ray_sorts(ray_local: None, tmp_path: Path) -> None:
    times = np.random.default_rng(0).integers(0, 3, ROWS)
    rows = table(0, ROWS).set_column(5, "t", pa.array(times))
    for at in range(4):  # workers sort on their own, and must agree
        pq.write_table(rows.slice(at * 30, 30), tmp_path / f"{at}.parquet", row_group_size=16)
    files = check_files((str(tmp_path),), TIMED)
    expected = np.argsort(times, kind="stable").tolist()
    for _ in range(2):
        assert all_rows(ray_batches(whole_iterator(files, TIMED), TIMED, 16, 0, 1, total=ROWS)) == expected


def test_files_without_statistics_are_in_order_where_their_times_are(tmp_path: Path) -> None:
    for name, begin, end in (("a", 0, 40), ("b", 40, 60)):
        pq.write_table(table(begin, end), tmp_path / f"{name}.parquet", row_group_size=16, write_statistics=False)
    files = check_files((str(tmp_path),), TIMED)
    assert is_sorted(files, "t")
    assert not is_sorted(Files(files.paths[::-1], files.rows[::-1], False), "t")


def test_a_null_time_is_found_without_statistics(tmp_path: Path) -> None:
    times = pa.array([None if row == 21 else row for row in range(40)], pa.int64())
    pq.write_table(table(0, 40).set_column(5, "t", times), tmp_path / "a.parquet", write_statistics=False)
    with pytest.raises(DataError, match=r"a\.parquet: column 't' \(data\.time\) has 1 null; every row needs a time"):
        is_sorted(check_files((str(tmp_path),), TIMED), "t")


def test_a_null_time_is_refused_by_file_and_row(tmp_path: Path) -> None:
    times = [None if row == 21 else row for row in range(40)]
    pq.write_table(table(0, 40).set_column(5, "t", pa.array(times, pa.int64())), tmp_path / "a.parquet")
    files = Files((str(tmp_path / "a.parquet"),), (40,), False)
    with pytest.raises(DataError, match=r"a\.parquet: column 't' \(data\.time\), row 21 is null; every row needs a time"):
        list(parquet_batches(files, TIMED, 16))


def test_a_struct_column_before_the_time_does_not_confuse_its_order(tmp_path: Path) -> None:
    rows = table(0, 40)
    structs = pa.array([{"a": -row, "b": row % 3} for row in range(40)])
    pq.write_table(rows.add_column(0, "s", structs), tmp_path / "a.parquet", row_group_size=8)
    assert is_sorted(check_files((str(tmp_path / "a.parquet"),), TIMED), "t")


def write_bad_label(folder: Path) -> Files:
    """40 rows in two files; the label of row 30, row 20 of the second file, is 5."""
    rows = table(0, 40).set_column(0, "label", pa.array([0] * 30 + [5] + [0] * 9))
    pq.write_table(rows.slice(0, 10), folder / "a.parquet")
    pq.write_table(rows.slice(10), folder / "b.parquet", row_group_size=8)
    return check_files((str(folder),), CONFIG)


def test_bad_data_met_in_the_reading_thread_comes_out_with_file_and_row(tmp_path: Path) -> None:
    batches = parquet_batches(write_bad_label(tmp_path), CONFIG, 16)
    next(batches)
    with pytest.raises(DataError, match=r"label column 'label', row 14: 5\.0; labels are 0 or 1 \(this is row 20 of .*b\.parquet\)"):
        list(batches)


def test_the_row_of_bad_data_is_the_files_whichever_worker_meets_it(tmp_path: Path) -> None:
    files = write_bad_label(tmp_path)
    assert len(list(parquet_batches(files, CONFIG, 16, rank=0, workers=2))) == 3
    with pytest.raises(DataError, match=r"row 6: 5\.0; .* \(this is row 20 of .*b\.parquet\)"):
        list(parquet_batches(files, CONFIG, 16, rank=1, workers=2))


def test_bad_data_met_behind_ray_comes_out(ray_local: None, tmp_path: Path) -> None:
    files = write_bad_label(tmp_path)
    with pytest.raises(DataError, match=r"global batch 1: label column 'label', row 6: 5\.0; .* \(this is row 30 in reading order\)"):
        list(ray_batches(whole_iterator(files, CONFIG), CONFIG, 16, 1, 2, total=40))


def damaged(folder: Path) -> Files:
    """A file whose footer is whole, and whose rows are not."""
    files = write(folder, 0, 5000)
    path = Path(files.paths[0])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    return files


def test_a_file_damaged_after_the_check_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"part-00\.parquet: reading it failed: [^\n]+$"):
        list(parquet_batches(damaged(tmp_path), CONFIG, 16))


def test_a_damaged_file_met_by_ray_is_refused_by_name_in_one_line(ray_local: None, tmp_path: Path) -> None:
    shard = ray_dataset(damaged(tmp_path), CONFIG).iterator()
    with pytest.raises(DataError, match=r"^/.*part-00\.parquet: reading it failed: [^\n]+$"):
        list(ray_batches(shard, CONFIG, 16, 0, 1, total=5000))


def test_row_groups_that_hold_no_row_of_a_worker_are_not_read(tmp_path: Path) -> None:
    files = write(tmp_path, 0, 64, group=8)
    path = Path(files.paths[0])
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(2).column(0)  # rows 16 to 24: the second worker's, of batches of 32
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert all_rows(parquet_batches(files, CONFIG, 32, rank=0, workers=2)) == [*range(16), *range(32, 48)]
    with pytest.raises(DataError, match=r"part-00\.parquet: reading it failed"):
        list(parquet_batches(files, CONFIG, 32, rank=1, workers=2))


def test_a_file_gone_after_the_check_is_refused_by_name(files: Files) -> None:
    Path(files.paths[1]).unlink()
    with pytest.raises(DataError, match=r"part-01\.parquet: reading it failed"):
        list(parquet_batches(files, CONFIG, 16))


def test_batches_can_be_left_half_read(files: Files) -> None:
    batches = parquet_batches(files, CONFIG, 1)
    assert next(batches).rows == 1
    batches.close()  # type: ignore[attr-defined]
    assert next(batches, None) is None
