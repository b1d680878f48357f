"""Parquet files for Ray Data, which reads each as it stands, in the order given.

Ray's own Parquet source (2.60) packs row groups into bins that it emits in another order, passes over files of other names than
`*.parquet` and files named twice, and makes columns of folders such as `date=5`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from fiited_ray.data.errors import DataError
from fiited_ray.data.files import Files
from fiited_ray.data.reader import nullable, one_line, rows_at_once


class ParquetFiles(Datasource):
    """Columns of files, a reading task for each.

    Args:
        columns: names; no others are read.
    """

    def __init__(self, files: Files, columns: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files, self._columns = files, columns

    def estimate_inmemory_data_size(self) -> None:
        """Unknown: it only decides on the number of tasks, which is the files'."""

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_tables, path, self._columns),
                BlockMetadata(num_rows=rows, size_bytes=None, exec_stats=None, input_files=(path,)),
                per_task_row_limit=per_task_row_limit,
            )
            for path, rows in zip(self._files.paths, self._files.rows, strict=True)
        ]


def _tables(path: str, columns: list[str]) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            for piece in file.iter_batches(rows_at_once(file.metadata, columns, 1), columns=columns, use_threads=False):
                yield nullable(piece)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: reading it failed: {one_line(error)}") from error
