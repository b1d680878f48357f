"""What can be known of the input files before anything starts: that they are there, readable and hold the right columns."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fiited_ray.config import DataConfig
from fiited_ray.data.errors import DataError

SYNTHETIC_KEY = b"fiited_ray.synthetic"


@dataclass(frozen=True)
class Files:
    """Parquet files in reading order."""

    paths: tuple[str, ...]  # absolute: workers have working folders of their own
    rows: tuple[int, ...]  # of each file
    synthetic: bool  # made by this project's generator
    text_ids: tuple[str, ...] = ()  # columns whose ids are text, which is hashed: they meet no integers

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    def first_rows(self, most: int | None) -> int:
        """How many rows are read where `most` are wanted (`data.max_rows`); None for all."""
        return self.total_rows if most is None else min(most, self.total_rows)

    def locate(self, row: int) -> str:
        """Where a row, counted over all files, stands."""
        for path, rows in zip(self.paths, self.rows, strict=True):
            if row < rows:
                return f"row {row} of {path}"
            row -= rows
        return f"row {row} behind the last file"


def check_files(patterns: tuple[str, ...], config: DataConfig, role: str = "data.train") -> Files:
    """Find files and check their schema against the config, from metadata alone.

    Args:
        patterns: files, folders or glob patterns.
        role: the config key, for messages.

    Raises:
        DataError: naming file and column.
    """
    paths = tuple(path for pattern in patterns for path in _expand(pattern, role))
    if not paths:
        raise DataError(f"{role}: no file named")
    rows, synthetic, first = [], False, None
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error
        if metadata.num_rows == 0:
            raise DataError(f"{path}: the file has no rows; remove it from {role}")
        _check_schema(path, schema, config)
        if config.time and (nulls := sum(each.null_count or 0 for each in column_statistics(metadata, config.time) if each is not None)):
            raise DataError(f"{path}: column {config.time!r} (data.time) has {nulls} null; every row needs a time")
        first = first or schema
        for name in config.columns:
            if schema.field(name).type != first.field(name).type:
                raise DataError(f"{path}: column {name!r} is {schema.field(name).type}, but {first.field(name).type} in {paths[0]}")
        rows.append(metadata.num_rows)
        synthetic |= SYNTHETIC_KEY in (schema.metadata or {})
    assert first is not None
    text_ids = tuple(name for name in config.id_columns if holds_text(first.field(name).type))
    _check_shared(paths[0], text_ids, config)
    return Files(tuple(str(Path(path).absolute()) for path in paths), tuple(rows), synthetic, text_ids)


def check_same_ids(files: Files, text_ids: Collection[str], where: str) -> None:
    """Refuse id columns that hold text where others hold integers, or the other way round: no id of one would be known in the other.

    Args:
        text_ids: the columns of the others that hold text.
        where: the others, for messages.

    Raises:
        DataError: naming column and files.
    """
    for name in sorted({*text_ids} ^ {*files.text_ids}):
        raise DataError(f"{files.paths[0]}: column {name!r} {differ(name in files.text_ids, where)}")


def differ(text: bool, where: str) -> str:
    """What is to be said of a column of ids whose kind is another than that of the same column elsewhere."""
    here, there = ("text", "integers") if text else ("integers", "text")
    return f"holds {here}, but {there} in {where}: ids as text and as integers are different ids; write the column as one type everywhere"


def column_statistics(metadata: pq.FileMetaData, column: str) -> list[pq.Statistics | None]:
    """Statistics of a flat column by row group; None where the writer left them out."""
    groups = range(metadata.num_row_groups)
    # leaves are numbered on their own: a struct before the column has several
    leaf = next(at for at in range(metadata.num_columns) if metadata.schema.column(at).path == column)
    return [metadata.row_group(group).column(leaf).statistics for group in groups]


def _expand(pattern: str, role: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():  # names that begin with a dot are files being written
        inside = (each for each in path.glob("**/*.parquet") if each.is_file() and not str(each.relative_to(path)).startswith("."))
        found = sorted(map(str, inside))
    elif any(mark in pattern for mark in "*?["):
        found = sorted(glob.glob(pattern, recursive=True))
    else:
        found = [pattern] if path.exists() else []
    if not found:
        raise DataError(f"{role}: no Parquet file at {pattern}")
    return found


def _check_schema(path: str, schema: pa.Schema, config: DataConfig) -> None:
    def check(name: str, key: str, fits: Callable[[pa.DataType], bool], wanted: str) -> None:
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(schema.names)}"
            raise DataError(f"{path}: no column {name!r} ({key}); {hint}")
        kind = schema.field(name).type
        if not fits(kind):
            raise DataError(f"{path}: column {name!r} ({key}) is {kind}; {wanted}")

    def is_number(kind: pa.DataType) -> bool:
        return (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
            or pa.types.is_decimal(kind)
            or pa.types.is_null(kind)
        )

    check(config.label, "data.label", is_number, "a label is a number, 0 or 1")
    for name in config.dense:
        check(name, "data.dense", is_number, "a dense column holds numbers")
    for name in config.categorical:
        if name not in config.bins:
            check(
                name, "data.categorical", _is_id, "ids are integers or strings; bin numbers with data.bins, put lists under data.multi_hot"
            )
    for cross in config.cross:
        for name in cross:
            if name not in config.bins:
                check(name, "data.cross", _is_id, "ids are integers or strings; bin numbers with data.bins")
    for name, derived in config.bins.items():
        check(derived.column, f"data.bins.{name}", is_number, "only numbers can be binned")
    for name in config.multi_hot:
        check(
            name,
            "data.multi_hot",
            lambda kind: pa.types.is_nested(kind) and hasattr(kind, "value_type") and _is_id(kind.value_type),
            "a multi_hot column holds lists of integers or strings",
        )
    for feature, name in config.weights.items():
        check(
            name,
            f"data.weights.{feature}",
            lambda kind: pa.types.is_nested(kind) and hasattr(kind, "value_type") and is_number(kind.value_type),
            f"the weights of {feature!r} are lists of numbers",
        )
    if config.time:
        check(
            config.time,
            "data.time",
            lambda kind: pa.types.is_integer(kind) or pa.types.is_temporal(kind) or pa.types.is_floating(kind),
            "time is a number or a timestamp",
        )


def _check_shared(path: str, text_ids: Collection[str], config: DataConfig) -> None:
    """Features that share a table and no id."""
    for table, features in config.shared_tables.items():
        of_columns = [name for name in features if name in config.categorical or name in config.multi_hot]
        text = [name for name in of_columns if name in text_ids]
        integers = [name for name in of_columns if name not in text_ids]
        if text and integers:
            raise DataError(
                f"{path}: column {integers[0]!r} {differ(False, repr(text[0]))}, or take one of them out of data.shared_tables.{table}"
            )


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_id(kind.value_type)
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column's ids, or those in its lists, are text or bytes, which are hashed."""
    return _is_text(kind.value_type if pa.types.is_nested(kind) else kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_sorted(files: Files, column: str) -> bool:
    """Whether the files are in the order of a column; it is read until one of them is not.

    Raises:
        DataError: for a null in it.
    """
    last: Any = None
    for path in files.paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, columns=[column])[column].combine_chunks()
                if values.null_count:
                    raise DataError(f"{path}: column {column!r} (data.time) has {values.null_count} null; every row needs a time")
                if len(values) and last is not None and values[0].as_py() < last:
                    return False
                if len(values) > 1 and pc.any(pc.less(values.slice(1), values.slice(0, len(values) - 1))).as_py():
                    return False
                last = values[-1].as_py() if len(values) else last
    return True
