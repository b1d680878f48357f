"""What is refused from the files' metadata alone, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.config import Bin, DataConfig
from fiited_ray.data import DataError, check_files
from fiited_ray.data.files import SYNTHETIC_KEY, Files, check_same_ids

ROWS = {"label": [0, 1], "age": [0.5, 1.5], "user": [7, 8], "tags": [["a"], []], "moment": [1, 2], "seconds": [[0.5], []]}
CONFIG = DataConfig(categorical=("user",))


def write(path: Path, metadata: dict[bytes, bytes] | None = None, **columns: Any) -> str:
    table = pa.table(ROWS | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


def refusal(*patterns: str, config: DataConfig = CONFIG) -> str:
    with pytest.raises(DataError) as caught:
        check_files(patterns, config)
    return str(caught.value)


def test_files_come_in_the_order_named_with_their_row_counts(tmp_path: Path) -> None:
    two = write(tmp_path / "two.parquet")
    pq.write_table(pa.concat_tables([pa.table(ROWS)] * 2), tmp_path / "four.parquet")
    found = check_files((two, str(tmp_path / "four.parquet")), CONFIG)
    assert found.paths == (two, str(tmp_path / "four.parquet"))
    assert (found.rows, found.total_rows) == ((2, 4), 6)


def test_relative_paths_mean_the_same_files_in_a_worker_with_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = write(tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert check_files(("train.parquet",), CONFIG).paths == (absolute,)


def test_a_folder_stands_for_its_parquet_files_in_sorted_order(tmp_path: Path) -> None:
    names = [write(tmp_path / "day" / name) for name in ("b.parquet", "a.parquet", "deeper/c.parquet")]
    (tmp_path / "day" / "notes.txt").write_text("no data")
    assert check_files((str(tmp_path / "day"),), CONFIG).paths == tuple(sorted(names))


def test_a_folder_may_hold_folders_of_parts_named_like_files_and_unfinished_ones(tmp_path: Path) -> None:
    for folder in ("b.parquet", ".unfinished-1"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part-00000.parquet")
    first = write(tmp_path / "a.parquet")
    assert check_files((str(tmp_path),), CONFIG).paths == (first, str(tmp_path / "b.parquet" / "part-00000.parquet"))


def test_a_glob_pattern_stands_for_what_it_matches_in_sorted_order(tmp_path: Path) -> None:
    names = [write(tmp_path / name) for name in ("b1.parquet", "a1.parquet", "a2.parquet")]
    assert check_files((str(tmp_path / "?1.parquet"),), CONFIG).paths == (names[1], names[0])


@pytest.mark.parametrize("pattern", ["none.parquet", "*.parquet", "."])
def test_a_pattern_without_a_file_is_refused(tmp_path: Path, pattern: str) -> None:
    assert refusal(str(tmp_path / pattern)) == f"data.train: no Parquet file at {tmp_path / pattern}"


def test_naming_no_file_at_all_is_refused_by_the_key() -> None:
    with pytest.raises(DataError, match=r"^data\.test: no file named$"):
        check_files((), CONFIG, "data.test")


def test_a_misspelt_column_gets_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    config = DataConfig(categorical=("usre",))
    assert refusal(path, config=config) == f"{path}: no column 'usre' (data.categorical); did you mean 'user'?"


def test_a_column_like_no_other_gets_the_list_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    config = DataConfig(categorical=("zzzzzz",))
    assert refusal(path, config=config) == f"{path}: no column 'zzzzzz' (data.categorical); it has label, age, user, tags, moment, seconds"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"label": "tags"}, "column 'tags' (data.label) is list<element: string>; a label is a number, 0 or 1"),
        ({"dense": ("tags",)}, "column 'tags' (data.dense) is list<element: string>; a dense column holds numbers"),
        ({"categorical": ("age",)}, "column 'age' (data.categorical) is double; ids are integers or strings; bin numbers with data.bins"),
        ({"categorical": ("tags",)}, "column 'tags' (data.categorical) is list<element: string>; ids are integers or strings"),
        ({"cross": (("user", "age"),)}, "column 'age' (data.cross) is double; ids are integers or strings; bin numbers with data.bins"),
        ({"multi_hot": ("age",)}, "column 'age' (data.multi_hot) is double; a multi_hot column holds lists of integers or strings"),
        ({"bins": {"band": Bin("tags", 1)}}, "column 'tags' (data.bins.band) is list<element: string>; only numbers can be binned"),
        (
            {"multi_hot": ("tags",), "weights": {"tags": "age"}},
            "column 'age' (data.weights.tags) is double; the weights of 'tags' are lists of numbers",
        ),
        (
            {"multi_hot": ("tags",), "weights": {"tags": "secnds"}},
            "no column 'secnds' (data.weights.tags); did you mean 'seconds'?",
        ),
        ({"time": "tags"}, "column 'tags' (data.time) is list<element: string>; time is a number or a timestamp"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_by_file_column_and_role(tmp_path: Path, roles: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet")
    assert refusal(path, config=DataConfig(**{"categorical": ("user",)} | roles)).startswith(f"{path}: {message}")


def test_lists_of_text_are_no_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", seconds=[["long"], []])
    assert "data.weights.tags" in refusal(path, config=DataConfig(multi_hot=("tags",), weights={"tags": "seconds"}))


def test_lists_of_numbers_are_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", seconds=[[2], []])
    assert check_files((path,), DataConfig(multi_hot=("tags",), weights={"tags": "seconds"})).total_rows == 2


def test_lists_of_lists_are_no_multi_hot_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", tags=[[["a"]], []])
    assert "data.multi_hot" in refusal(path, config=DataConfig(multi_hot=("tags",)))


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint64(), pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_integers_strings_booleans_and_dictionaries_are_ids(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", user=pa.array([None, None], kind))
    assert check_files((path,), CONFIG).rows == (2,)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(ROWS).slice(0, 0), path)
    assert refusal(str(path)) == f"{path}: the file has no rows; remove it from data.train"


@pytest.mark.parametrize("content", [b"", b"label,user\n0,1\n", b"PAR1 but nothing else PAR1"], ids=["nothing", "CSV", "no footer"])
def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    assert refusal(str(path)).startswith(f"{path}: ")


def test_a_parquet_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(str(path)).startswith(f"{path}: not a readable Parquet file: ")


def test_a_folder_in_a_files_place_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()
    assert refusal(str(tmp_path / "*.parquet")).startswith(f"{tmp_path / 'x.parquet'}: cannot be read: ")


def test_a_column_of_two_types_in_two_files_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet", user=["7", "8"])
    assert refusal(first, second) == f"{second}: column 'user' is string, but int64 in {first}"


def test_columns_that_are_not_used_may_differ(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet", moment=["x", "y"])
    assert check_files((first, second), CONFIG).total_rows == 4


def test_one_synthetic_file_marks_all_as_synthetic(tmp_path: Path) -> None:
    plain, made = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet", {SYNTHETIC_KEY: b"yes"})
    assert not check_files((plain,), CONFIG).synthetic
    assert check_files((plain, made), CONFIG).synthetic


def test_a_time_column_with_nulls_is_refused_from_its_statistics(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", moment=[1, None])
    config = DataConfig(categorical=("user",), time="moment")
    assert refusal(path, config=config) == f"{path}: column 'moment' (data.time) has 1 null; every row needs a time"


IDS = DataConfig(categorical=("user", "band"), multi_hot=("tags",), cross=(("user", "city"),), bins={"band": Bin("age", 1)})


def two_sets(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[Files, Files]:
    paths = write(folder / "train.parquet", **{"city": ["a", "b"]} | first), write(folder / "test.parquet", **{"city": ["a", "b"]} | second)
    train, test = (check_files((path,), IDS) for path in paths)
    return train, test


@pytest.mark.parametrize(
    ("column", "kinds", "first", "second"),
    [
        ("user", ("integers", "text"), [7, 8], ["7", "8"]),
        ("user", ("text", "integers"), [b"7", b"8"], [True, False]),
        ("user", ("integers", "text"), [7, 8], pa.array(["7", "8"]).dictionary_encode()),
        ("tags", ("text", "integers"), [["a"], []], [[1], []]),
        ("city", ("text", "integers"), ["a", "b"], [1, 2]),
    ],
)
def test_ids_of_another_kind_than_those_trained_on_are_refused(
    tmp_path: Path, column: str, kinds: tuple[str, str], first: Any, second: Any
) -> None:
    train, test = two_sets(tmp_path, {column: first}, {column: second})
    with pytest.raises(DataError) as caught:
        check_same_ids(test, train.text_ids, train.paths[0])
    message = f"{test.paths[0]}: column {column!r} holds {kinds[1]}, but {kinds[0]} in {train.paths[0]}: ids as text and as integers are"
    assert str(caught.value).startswith(message)


def test_ids_of_the_same_kind_in_another_type_are_taken(tmp_path: Path) -> None:
    narrow = {"user": pa.array([7, 8], pa.int8()), "age": [1, 2], "tags": [[b"a"], []], "city": pa.array(["a", "b"]).dictionary_encode()}
    train, test = two_sets(tmp_path, {}, narrow)
    assert {*train.text_ids} == {*test.text_ids} == {"tags", "city"}
    check_same_ids(test, train.text_ids, train.paths[0])


def test_features_that_share_a_table_and_no_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    shared = DataConfig(categorical=("user",), multi_hot=("tags",), shared_tables={"both": ("user", "tags")})
    message = f"{path}: column 'user' holds integers, but text in 'tags': ids as text and as integers are different ids"
    assert refusal(path, config=shared).startswith(message)
    assert refusal(path, config=shared).endswith("or take one of them out of data.shared_tables.both")
    assert check_files((write(tmp_path / "b.parquet", user=["a", "b"]),), shared).text_ids == ("user", "tags")
