"""Two ways from Parquet to batches with one contract: step t of any number of workers is the same rows of the files.

Rows of global batch t are dealt in contiguous slices: of its n rows worker k gets rows k*n//W up to (k+1)*n//W. The last batch is
short, and a worker may find itself with no row in it, so that all workers take the same number of steps and no row is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fiited_ray.ahead import ahead
from fiited_ray.config import DataConfig
from fiited_ray.data.batch import Batch
from fiited_ray.data.collate import Collator
from fiited_ray.data.errors import DataError
from fiited_ray.data.files import Files, is_sorted

if TYPE_CHECKING:
    import ray.data

_log = logging.getLogger(__name__)
_PREFETCH = 2  # batches made ahead by the reading thread
_MOST_READ = 65536  # rows that Arrow decodes at a time
_TOGETHER = 32768  # rows that are read and collated at a time: a training step has emptied the caches since the last time
_TOGETHER_VALUES = 1 << 21  # and values of their columns, unless a single batch has more: long lists take memory


def parquet_batches(
    files: Files,
    config: DataConfig,
    batch_size: int,
    *,
    rank: int = 0,
    workers: int = 1,
    max_rows: int | None = None,
    first_step: int = 0,
    prefetch: bool = True,
) -> Iterator[Batch]:
    """Read files directly with Arrow in a thread of its own; row groups that hold no row of this worker's are left out.

    With `config.time` the rows come in that column's order; files that are not sorted by it are an error here.

    Args:
        batch_size: rows of a global batch; this worker gets its slice.
        first_step: number of the first global batch wanted; row groups before it are not read.

    Raises:
        DataError: for bad data, naming file, column and row.
    """
    total = files.first_rows(max_rows)
    share = _Share(batch_size, total, rank, workers, first_step)
    batches = _collated(_slices(files, config, share), Collator(config), batch_size, files.locate, first_step)
    return ahead(batches, _PREFETCH, "batches") if prefetch else batches


def ray_dataset(files: Files, config: DataConfig, max_rows: int | None = None) -> ray.data.Dataset:
    """The columns of a config as a streaming Ray Data set, in file order or, with a time column, in time order."""
    import ray.data

    from fiited_ray.data.ray_source import ParquetFiles

    source = ParquetFiles(files, config.columns)
    # one reading task at a time for each consumer: more would start processes faster than they are needed
    dataset = ray.data.read_datasource(source, concurrency=1, override_num_blocks=len(files.paths))
    if config.time and not is_sorted(files, config.time):
        dataset = dataset.sort(config.time)
    return dataset if max_rows is None else dataset.limit(max_rows)


def ray_batches(
    shard: ray.data.DataIterator, config: DataConfig, batch_size: int, rank: int, workers: int, first_step: int = 0, *, total: int
) -> Iterator[Batch]:
    """A worker's batches from its Ray Data iterator, which must deliver the whole data set in order (see `data_config`).

    Every worker runs the whole data set's reading and cuts its slice out of each global batch before it is collated: exact order and
    equal steps for any number of workers and no row lost, at the price of decoding the Parquet columns once for each worker.
    (`streaming_split` would decode them once, but deals out blocks as they come and, when the shares are to be equal, drops rows.)

    Args:
        total: rows of the whole data set.

    Raises:
        DataError: for bad data, naming column and row in reading order; for more or fewer rows than there are.
    """
    tables = shard.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=_PREFETCH)
    slices = _sliced(islice(_complete(tables, total), first_step, None), rank, workers)
    return ahead(
        _collated(slices, Collator(config), batch_size, lambda row: f"row {row} in reading order", first_step), _PREFETCH, "batches"
    )


def _complete(tables: Iterable[pa.Table], total: int) -> Iterator[pa.Table]:
    """Tables as they come, which must have so many rows; where reading them failed in a task of Ray's, that in a line."""
    from ray.exceptions import RayTaskError

    rows = 0
    try:
        for table in tables:
            rows += table.num_rows
            yield table
    except RayTaskError as error:
        said = str(error.cause).partition("\n")[0]  # Ray adds lines to what the task said
        raise DataError(said if isinstance(error.cause, DataError) else f"reading the data failed: {one_line(error.cause)}") from error
    if rows != total:
        raise DataError(f"data.reader=ray: {rows:,} rows came of the {total:,} in the files; read them with data.reader=arrow")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Slices:
    """A worker's slices of consecutive global batches, one behind the other."""

    table: pa.Table
    begins: list[int]  # where in its global batch each begins
    ends: list[int]  # of the table's rows, where each ends


def _collated(
    all_slices: Iterable[_Slices], collate: Collator, batch_size: int, locate: Callable[[int], str], first_step: int
) -> Iterator[Batch]:
    """A batch of each slice; `locate` names a row of the data."""
    step = first_step
    for slices in all_slices:
        try:
            together = collate.strictly(slices.table)
        except DataError:  # the fault is one batch's, and the batches before it are read all the same
            yield from _collated_each(slices, collate, batch_size, locate, step)
        else:
            yield from together.split(slices.ends, len(collate.config.features))
        step += len(slices.ends)


def _collated_each(slices: _Slices, collate: Collator, batch_size: int, locate: Callable[[int], str], first_step: int) -> Iterator[Batch]:
    for step, begin, start, end in zip(count(first_step), slices.begins, [0, *slices.ends], slices.ends, strict=False):
        first = step * batch_size + begin

        def note(fault: DataError, rows: int, first: int = first) -> None:
            assert fault.row is not None
            _log.warning("%s (this is %s): %d such row(s) of the batch are left out", fault, locate(first + fault.row), rows)

        try:
            yield collate(slices.table.slice(start, end - start), f"global batch {step}", note)
        except DataError as error:
            if error.row is None:
                raise
            raise DataError(f"{error} (this is {locate(first + error.row)})") from None


def data_config() -> Any:
    """How Ray Train must hand out the data set: whole and in order."""
    import ray.data
    import ray.train

    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(datasets_to_split=[], execution_options=options)


@dataclass(frozen=True)
class _Share:
    """Which rows a worker needs."""

    batch_size: int
    total: int
    rank: int
    workers: int
    first_step: int = 0

    @property
    def steps(self) -> int:
        return -(-self.total // self.batch_size)

    def of(self, step: int) -> tuple[int, int]:
        """First row of a global batch that is this worker's, and the one behind its last, counted over all files."""
        first = step * self.batch_size
        rows = min(self.batch_size, self.total - first)
        return first + self.rank * rows // self.workers, first + (self.rank + 1) * rows // self.workers

    def touches(self, begin: int, end: int) -> bool:
        """Whether any row from begin to end (exclusive) is this worker's."""
        steps = range(max(self.first_step, begin // self.batch_size), min(self.steps, -(-end // self.batch_size)))
        return any(max(begin, first) < min(end, last) for first, last in map(self.of, steps))


def _slices(files: Files, config: DataConfig, share: _Share) -> Iterator[_Slices]:
    """Those of all global batches that end in the same piece together, one that goes beyond it by itself."""
    columns = config.columns
    pieces = _pieces(files, config, columns, share)
    at, piece = 0, _empty(files, columns)
    step = share.first_step
    while step < share.steps:
        position, end = share.of(step)
        while position < end and at + piece.num_rows <= position:
            at, piece = next(pieces)
        behind = step + 1
        while behind < share.steps and share.of(behind)[1] <= at + piece.num_rows:
            behind += 1
        slices = [share.of(each) for each in range(step, behind)]
        begins = [begin - each * share.batch_size for each, (begin, _) in enumerate(slices, step)]
        parts = []
        for position, end in _merged(slices):
            while position < end:
                while at + piece.num_rows <= position:
                    at, piece = next(pieces)
                parts.append(piece.slice(position - at, end - position))
                position += parts[-1].num_rows
        yield _Slices(
            pa.concat_tables(parts) if parts else piece.slice(0, 0), begins, list(accumulate(end - begin for begin, end in slices))
        )
        step = behind


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges, from and to, with those that follow on one another in one: a single worker's are all one range, which is not copied."""
    merged: list[tuple[int, int]] = []
    for begin, end in ranges:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def _pieces(files: Files, config: DataConfig, columns: list[str], share: _Share) -> Iterator[tuple[int, pa.Table]]:
    """Consecutive rows, and the number of the first: all that the share needs, in order, and what shares a row group with them."""
    file_begin, last_time = 0, None
    for path, file_rows in zip(files.paths, files.rows, strict=True):
        try:
            with pq.ParquetFile(path) as file:
                for groups, begin in _runs(file.metadata, file_begin, share):
                    at = begin
                    size = min(_MOST_READ, rows_at_once(file.metadata, columns, share.batch_size))
                    # By this thread alone: Arrow's others would take cores from the model, and need half as much CPU time again.
                    for piece in file.iter_batches(size, row_groups=groups, columns=columns, use_threads=False):
                        table = nullable(piece).slice(0, share.total - at)
                        last_time = _check_order(table, config.time, last_time, path, at - file_begin)
                        yield at, table
                        at += table.num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: reading it failed: {one_line(error)}") from error
        file_begin += file_rows


def nullable(piece: pa.RecordBatch) -> pa.Table:
    """A table whose columns may hold nulls: some files declare that theirs do not, and Arrow then takes them for another kind."""
    return pa.Table.from_arrays(piece.columns, schema=pa.schema([field.with_nullable(True) for field in piece.schema]))


def rows_at_once(metadata: pq.FileMetaData, columns: list[str], batch_size: int) -> int:
    """As many whole batches as are read together, by what the columns of the first row group hold."""
    group = metadata.row_group(0)
    leaves = map(group.column, range(group.num_columns))
    values = sum(leaf.num_values for leaf in leaves if any(f"{leaf.path_in_schema}.".startswith(f"{name}.") for name in columns))
    rows = min(_TOGETHER, _TOGETHER_VALUES * group.num_rows // max(1, values))
    return max(1, rows // batch_size) * batch_size


def _runs(metadata: pq.FileMetaData, file_begin: int, share: _Share) -> list[tuple[list[int], int]]:
    """Row groups that a share needs, those behind one another together, and the first row of each such run."""
    runs: list[tuple[list[int], int]] = []
    begin = file_begin
    for group in range(metadata.num_row_groups):
        end = begin + metadata.row_group(group).num_rows
        if share.touches(begin, end):
            if runs and runs[-1][0][-1] == group - 1:
                runs[-1][0].append(group)
            else:
                runs.append(([group], begin))
        begin = end
    return runs


def _empty(files: Files, columns: list[str]) -> pa.Table:
    try:
        return pq.read_schema(files.paths[0]).empty_table().select(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{files.paths[0]}: reading it failed: {one_line(error)}") from error


def _check_order(table: pa.Table, column: str | None, last: Any, path: str, first_row: int) -> Any:
    if column is None or table.num_rows == 0:
        return last
    values = table[column].combine_chunks()
    values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    if values.null_count:
        row = first_row + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
        raise DataError(f"{path}: column {column!r} (data.time), row {row} is null; every row needs a time")
    falls = pc.less(values.slice(1), values.slice(0, len(values) - 1)) if len(values) > 1 else None
    if (falls is not None and pc.any(falls).as_py()) or (last is not None and values[0].as_py() < last):
        raise DataError(f"{path}: not in the order of {column!r} near row {first_row}; sort the files by it, or leave data.time out")
    return values[-1].as_py()


def _sliced(tables: Iterable[pa.Table], rank: int, workers: int) -> Iterator[_Slices]:
    """A worker's slices of tables that are a global batch each."""
    parts, begins, rows = [], [], 0
    for table in tables:
        begins.append(rank * table.num_rows // workers)
        parts.append(table.slice(begins[-1], (rank + 1) * table.num_rows // workers - begins[-1]))
        rows += table.num_rows
        if rows + table.num_rows > _TOGETHER or (len(parts) + 1) * table.nbytes > 8 * _TOGETHER_VALUES:
            yield _joined(parts, begins)
            parts, begins, rows = [], [], 0
    if parts:
        yield _joined(parts, begins)


def _joined(parts: list[pa.Table], begins: list[int]) -> _Slices:
    return _Slices(pa.concat_tables(parts), begins, list(accumulate(part.num_rows for part in parts)))
