"""Parquet output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from fiited_ray.data.errors import DataError


class SplitWriter:
    """Writes rows in order and divides them, once their number is known, into train.parquet and test.parquet.

        part 0 | part 1 | part 2        ->   train.parquet/ part 0, part 1, head of part 2;  test.parquet: tail of part 2

    Rows go to parts in a hidden folder; `publish` cuts the one part that holds the border and moves all to their place. A set of one
    part is a file, a larger one a folder of files: either can be named in a configuration. Leaving the context without publishing
    removes everything.

    Args:
        part_rows: most rows of a part.
        group_rows: most rows of a row group; None: as many as are written at a time.

    Raises:
        DataError: when the folder cannot be written, or already holds train.parquet or test.parquet.
    """

    def __init__(self, folder: Path, part_rows: int = 4_000_000, group_rows: int | None = None) -> None:
        self.rows = 0
        self._folder, self._part_rows, self._group_rows = folder, part_rows, group_rows
        self._folder_is_new = not folder.exists()
        self._scratch = folder / f".unfinished-{os.getpid()}"
        self._parts: list[tuple[Path, int]] = []  # path, rows
        self._writer: pq.ParquetWriter | None = None
        for name in ("train.parquet", "test.parquet"):
            if (folder / name).exists():
                raise DataError(f"{folder / name}: already there; remove it, or name another --output")

    def __enter__(self) -> SplitWriter:
        try:
            self._scratch.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if error is not None and self._folder_is_new:
            with contextlib.suppress(OSError):  # somebody else's files may have come into it
                self._folder.rmdir()

    def write(self, table: pa.Table) -> None:
        """Append rows; each call is a row group or more."""
        while table.num_rows:
            if self._writer is None:
                self._parts.append((self._scratch / f"part-{len(self._parts):05d}.parquet", 0))
                self._writer = pq.ParquetWriter(self._parts[-1][0], table.schema)
            path, rows = self._parts[-1]
            piece = table.slice(0, self._part_rows - rows)
            self._writer.write_table(piece, self._group_rows)
            self._parts[-1] = (path, rows + piece.num_rows)
            self.rows += piece.num_rows
            table = table.slice(piece.num_rows)
            if self._parts[-1][1] == self._part_rows:
                self._close()

    def publish(self, train_rows: int) -> list[Path]:
        """Put the first train_rows rows into train.parquet and the others into test.parquet; a set of no rows is not written."""
        self._close()
        train: list[Path] = []
        test: list[Path] = []
        begin = 0
        for path, rows in self._parts:
            if begin + rows <= train_rows:
                train.append(path)
            elif begin >= train_rows:
                test.append(path)
            else:
                head, tail = path.with_suffix(".head"), path.with_suffix(".tail")
                _cut(path, train_rows - begin, head, tail)
                path.unlink()
                train.append(head)
                test.append(tail)
            begin += rows
        return [self._place(name, parts) for name, parts in (("train.parquet", train), ("test.parquet", test)) if parts]

    def _place(self, name: str, parts: list[Path]) -> Path:
        target = self._folder / name
        if len(parts) == 1:
            return parts[0].replace(target)
        gathered = self._scratch / name
        gathered.mkdir()
        for number, part in enumerate(parts):
            part.replace(gathered / f"part-{number:05d}.parquet")
        return gathered.replace(target)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _cut(path: Path, at: int, head: Path, tail: Path) -> None:
    with (
        pq.ParquetFile(path) as file,
        pq.ParquetWriter(head, file.schema_arrow) as first,
        pq.ParquetWriter(tail, file.schema_arrow) as second,
    ):
        begin = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            rows_of_first = min(max(at - begin, 0), table.num_rows)
            for writer, piece in ((first, table.slice(0, rows_of_first)), (second, table.slice(rows_of_first))):
                if piece.num_rows:
                    writer.write_table(piece)
            begin += table.num_rows
