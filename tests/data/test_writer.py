"""Parquet output in parts: cut where told, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.config import load
from fiited_ray.data import DataError, check_files, parquet_batches
from fiited_ray.data.convert import Avazu, Criteo, Format, convert
from fiited_ray.data.writer import SplitWriter

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def rows(begin: int, end: int) -> pa.Table:
    return pa.table({"row": list(range(begin, end))})


def read(path: Path) -> list[int]:
    numbers: list[int] = pq.read_table(path)["row"].to_pylist() if path.exists() else []
    return numbers


@pytest.mark.parametrize("train_rows", [0, 1, 9, 10, 11, 24, 30, 35, 36])
@pytest.mark.parametrize("part_rows", [1, 10, 36, 100])
def test_rows_are_divided_in_order_wherever_the_cut_and_the_parts_fall(tmp_path: Path, train_rows: int, part_rows: int) -> None:
    with SplitWriter(tmp_path, part_rows) as writer:
        for begin in range(0, 36, 4):
            writer.write(rows(begin, begin + 4))
        assert writer.rows == 36
        published = writer.publish(train_rows)
    assert read(tmp_path / "train.parquet") == list(range(train_rows))
    assert read(tmp_path / "test.parquet") == list(range(train_rows, 36))
    assert sorted(tmp_path.iterdir()) == sorted(published)


def test_one_part_is_a_file_and_more_are_a_folder_of_files_no_longer_than_told(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, 10) as writer:
        writer.write(rows(0, 36))
        train, test = writer.publish(32)
    assert test.is_file()
    assert [pq.read_metadata(part).num_rows for part in sorted(train.iterdir())] == [10, 10, 10, 2]


def test_row_groups_are_no_larger_than_told_on_both_sides_of_the_cut(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, 20, group_rows=4) as writer:
        writer.write(rows(0, 10))
        writer.write(rows(10, 36))
        train, test = writer.publish(27)
    paths = [*sorted(train.iterdir()), test]
    assert [number for path in paths for number in read(path)] == list(range(36))
    files = [pq.ParquetFile(path) for path in paths]
    assert [[file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] for file in files] == [
        [4, 4, 2, 4, 4, 2],
        [4, 3],
        [1, 4, 4],
    ]


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "out") as writer:
        writer.write(rows(0, 5))
    assert list((tmp_path / "out").iterdir()) == []


def fail_while_writing(folder: Path) -> None:
    with SplitWriter(folder) as writer:
        writer.write(rows(0, 5))
        raise KeyError


def test_a_failure_takes_the_new_folder_away_again_and_leaves_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(KeyError):
            fail_while_writing(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


def test_an_output_that_is_there_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").mkdir()
    with pytest.raises(DataError, match=r"test\.parquet: already there; remove it"):
        SplitWriter(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out: cannot be written: Not a directory"), SplitWriter(tmp_path / "file" / "out"):
        pass


CRITEO = "\n".join("\t".join([str(at % 2), *["", "-1", "5"], *["7"] * 10, *["05db9164"] * 25, ""]) for at in range(40))
AVAZU = "\n".join(
    [
        ",".join(["id", "click", "hour", *Avazu.decimal[:2], *Avazu.hexadecimal, *Avazu.decimal[2:]]),
        *(f"1,{at % 2},141021{at % 24:02},1005,0,{'85f751fd,' * 9}1,0" + ",7" * 8 for at in range(24)),
    ]
)


@pytest.mark.parametrize(("form", "text"), [(Criteo, CRITEO), (Avazu, AVAZU)])
def test_the_configuration_of_a_log_reads_what_its_conversion_wrote(tmp_path: Path, form: type[Format], text: str) -> None:
    (tmp_path / "log").write_text(text)
    convert([tmp_path / "log"], tmp_path / "out", form(), split=0.25, part_rows=7)
    config = load(CONFIGS / f"{form.__name__.lower()}.yaml").data
    for name, share in (("train", 0.75), ("test", 0.25)):
        files = check_files((str(tmp_path / "out" / f"{name}.parquet"),), config)
        batches = list(parquet_batches(files, config, 16))
        for batch in batches:
            batch.validate(config.features, config.dense)
        assert sum(batch.rows for batch in batches) == files.total_rows == share * (40 if form is Criteo else 24)
