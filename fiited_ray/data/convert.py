"""Public click logs to Parquet: Criteo (Kaggle's and the Terabyte one) and Avazu, in one pass and bounded memory.

A line that cannot be read is counted and left out; a file with many of them is refused, and then nothing is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fiited_ray.data.errors import DataError
from fiited_ray.data.lines import Block, Mask, Positions, Progress, parse_decimal, parse_hex, read_blocks
from fiited_ray.data.writer import SplitWriter

_DAY = 86400
Content = npt.NDArray[np.uint8]
Parsed = tuple[dict[str, pa.Array], list[tuple[str, Any]]]  # columns, and which rows are wrong in which way


class Format(ABC):
    """How one source's lines become columns."""

    separator: bytes
    columns: int

    @abstractmethod
    def begin(self, block: Block, counts: Positions) -> Block:
        """Look at a file's first lines, given their numbers of fields; take the header off.

        Raises:
            DataError: when this is not a file of the format with labels.
        """

    @abstractmethod
    def parse(self, content: Content, starts: Positions, ends: Positions) -> Parsed:
        """Columns of the fields [rows, columns]."""


class Criteo(Format):
    """Tab-separated: label, 13 counts I1..I13, 26 ids C1..C26 of 8 hexadecimal digits; an empty field is a missing value.

    Kaggle's Display Advertising Challenge (train.txt) and the Terabyte click logs (day_0.gz ...) are written this way.
    """

    separator = b"\t"
    columns = 40

    def begin(self, block: Block, counts: Positions) -> Block:
        if (counts == self.columns - 1).mean() > 0.5:
            raise DataError(
                f"{block.path}: lines have 39 columns, so there is no label: this looks like Kaggle's test.txt, whose labels were never "
                "published; convert train.txt and set its last rows aside with --split"
            )
        return block

    def parse(self, content: Content, starts: Positions, ends: Positions) -> Parsed:
        label, bad_label = _label(content, starts[:, 0], ends[:, 0])
        counts, bad_count = parse_decimal(content, starts[:, 1:14], ends[:, 1:14])
        ids, bad_id = parse_hex(content, starts[:, 14:], ends[:, 14:])
        empty = starts == ends
        table = {"label": label}
        table |= {f"I{at + 1}": pa.array(counts[:, at], mask=empty[:, 1 + at]) for at in range(13)}
        table |= {f"C{at + 1}": pa.array(ids[:, at], mask=empty[:, 14 + at]) for at in range(26)}
        return table, [("bad label", bad_label), ("bad integer", bad_count.any(1)), ("bad hex id", bad_id.any(1))]


class Avazu(Format):
    """Comma-separated with a header; `hour` is YYMMDDHH in UTC. Ids are 8 hexadecimal digits or whole numbers."""

    separator = b","
    columns = 24
    hexadecimal = (
        "site_id",
        "site_domain",
        "site_category",
        "app_id",
        "app_domain",
        "app_category",
        "device_id",
        "device_ip",
        "device_model",
    )
    decimal = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{number}" for number in range(14, 22)))
    _order = ("id", "click", "hour", *decimal[:2], *hexadecimal, *decimal[2:])

    def __init__(self) -> None:
        self._names: Sequence[str] = self._order

    def begin(self, block: Block, counts: Positions) -> Block:
        names = [name.strip() for name in block.text(0).decode(errors="replace").split(",")]
        if "click" not in names and (set(names) & set(self._order) or (counts == self.columns - 1).mean() > 0.5):
            raise DataError(
                f"{block.path}: there is no column 'click': this looks like Kaggle's test file, whose labels were never published; "
                "convert the train file and set its last day aside with --split last-day"
            )
        if names[0].isdigit():  # a later piece of a file that was cut up
            return block
        missing = [name for name in self._order if name not in names]
        if missing or len(names) != self.columns:
            raise DataError(f"{block.path}: not Avazu's header: {', '.join(missing) or 'too many columns'}{' missing' if missing else ''}")
        self._names = names
        return block.without_first()

    def parse(self, content: Content, starts: Positions, ends: Positions) -> Parsed:
        def pick(names: Sequence[str]) -> tuple[Positions, Positions]:
            at = [self._names.index(name) for name in names]
            return starts[:, at], ends[:, at]

        clicks, hours = pick(["click"]), pick(["hour"])
        label, bad_label = _label(content, clicks[0][:, 0], clicks[1][:, 0])
        hour, bad_hour = parse_decimal(content, hours[0][:, 0], hours[1][:, 0])
        seconds, no_such_hour = _epoch_seconds(hour)
        numbers_at, ids_at = pick(self.decimal), pick(self.hexadecimal)
        numbers, bad_number = parse_decimal(content, *numbers_at)
        ids, bad_id = parse_hex(content, *ids_at)
        table = {
            "label": label,
            "time": pa.array(seconds),
            "hour_of_day": pa.array((seconds // 3600 % 24).astype(np.int8)),
            "weekday": pa.array(((seconds // _DAY + 3) % 7).astype(np.int8)),  # day 0 was a Thursday; 0 is Monday
        }
        table |= {name: pa.array(ids[:, at], mask=ids_at[0][:, at] == ids_at[1][:, at]) for at, name in enumerate(self.hexadecimal)}
        table |= {name: pa.array(numbers[:, at], mask=numbers_at[0][:, at] == numbers_at[1][:, at]) for at, name in enumerate(self.decimal)}
        wrong = [("bad label", bad_label), ("bad hour", bad_hour | no_such_hour)]
        return table, [*wrong, ("bad integer", bad_number.any(1)), ("bad hex id", bad_id.any(1))]


def _label(content: Content, starts: Positions, ends: Positions) -> tuple[pa.Array, Mask]:
    label = content[np.minimum(starts, len(content) - 1)].astype(np.int8) - ord("0")
    return pa.array(label), (ends - starts != 1) | ((label != 0) & (label != 1))


def _epoch_seconds(hours: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Mask]:
    """Seconds since 1970 of YYMMDDHH, and where there is no such hour."""
    year, month, day, hour = 2000 + hours // 10**6, hours // 10**4 % 100, hours // 100 % 100, hours % 100
    wrong = (hours < 0) | (year > 2099) | (month < 1) | (month > 12) | (day < 1) | (hour > 23)
    months = np.where(wrong, 0, (year - 1970) * 12 + month - 1)
    begins, next_begins = ((months + more).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) for more in (0, 1))
    wrong |= begins + day - 1 >= next_begins
    return np.where(wrong, 0, (begins + day - 1) * _DAY + hour * 3600), wrong


@dataclass
class Report:
    """What became of the lines."""

    train_rows: int = 0
    test_rows: int = 0
    blank: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where it was first met
    paths: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"wrote {self.train_rows:,} training and {self.test_rows:,} test rows: {', '.join(map(str, self.paths))}"]
        lines += [f"blank lines skipped: {self.blank:,}"] if self.blank else []
        return "\n".join(lines + self.describe_rejected())

    def describe_rejected(self) -> list[str]:
        return [f"lines left out, {reason}: {count:,} (first: {self.examples[reason]})" for reason, count in self.rejected.most_common()]


def convert(
    inputs: Sequence[Path],
    folder: Path,
    form: Format,
    *,
    split: float | str = 0.1,
    max_rejected: float = 0.01,
    max_rows: int | None = None,
    part_rows: int = 4_000_000,
    group_rows: int | None = None,
    block_bytes: int = 16 << 20,
) -> Report:
    """Convert text files, in the order given, to folder/train.parquet and folder/test.parquet.

    Args:
        split: share of the last rows that become the test set, or "last-day" (Avazu).
        max_rejected: largest share of non-blank lines that may be unreadable.
        max_rows: stop after so many rows; what lies behind the last of them is not looked at.
        part_rows: rows of one output file; beyond that, train.parquet is a folder of parts.
        group_rows: most rows of a row group; None: those of a block.

    Raises:
        DataError: naming the file; nothing is written then.
    """
    by_day = split == "last-day"
    if by_day and not isinstance(form, Avazu):
        raise DataError("--split last-day: only Avazu's lines have a time; give a share such as 0.1")
    if not by_day and not 0 <= float(split) < 1:
        raise DataError(f"--split {split}: a share of at least 0 and below 1 is wanted")
    if max_rows is not None and max_rows < 1:
        raise DataError(f"--max-rows {max_rows}: at least 1 is wanted")
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: {'a folder; name the files in it' if path.is_dir() else 'no such file'}")
    report, days = Report(), _Days()
    progress = Progress(sum(path.stat().st_size for path in inputs))
    with SplitWriter(folder, part_rows, group_rows) as writer:
        for path in inputs:
            for block in read_blocks(path, progress, lambda: writer.rows, block_bytes):
                table = _table(block, form, report, None if max_rows is None else max_rows - writer.rows)
                if by_day:
                    days.see(path, table, writer.rows)
                writer.write(table)
                if writer.rows == max_rows:
                    break
            if writer.rows == max_rows:
                break
        progress.show(0, writer.rows, last=True)
        _refuse_mostly_unreadable(report, writer.rows, max_rejected)
        train_rows = days.last_begins() if by_day else writer.rows - round(writer.rows * float(split))
        report.train_rows, report.test_rows = train_rows, writer.rows - train_rows
        report.paths = writer.publish(train_rows)
    return report


def _table(block: Block, form: Format, report: Report, most: int | None) -> pa.Table:
    """The readable rows of a block, the first `most` where so many are there; the other lines up to the last are counted in the report."""
    counts, starts, ends = block.fields(form.separator, form.columns)
    if block.first_line == 1:
        begun = form.begin(block, counts)
        if begun is not block:
            block = begun
            counts, starts, ends = block.fields(form.separator, form.columns)
    blank = block.starts == block.ends
    right = counts == form.columns
    unreadable = block.not_utf8()
    columns, wrong = form.parse(block.content, starts, ends)
    good = right & ~unreadable
    faults = [("bad UTF-8", unreadable), ("wrong number of columns", ~right & ~blank & ~unreadable)]
    for reason, rows in wrong:
        lines = np.zeros(len(right), bool)
        lines[right] = rows
        faults.append((reason, lines & good))
        good &= ~lines
    behind = len(good) if most is None or good.sum() < most else int(np.flatnonzero(good)[most - 1]) + 1
    good[behind:] = False
    report.blank += int(blank[:behind].sum())
    for reason, lines in faults:
        if lines[:behind].any():
            report.rejected[reason] += int(lines[:behind].sum())
            report.examples.setdefault(reason, f"{block.path}, line {block.first_line + int(lines.argmax())}")
    table = pa.table(columns)
    return table if good.all() else table.filter(pa.array(good[right]))


def _refuse_mostly_unreadable(report: Report, rows: int, most: float) -> None:
    rejected = report.rejected.total()
    if rows == 0:
        raise DataError("\n".join(["no line could be read; is this the right kind of file?", *report.describe_rejected()]))
    if rejected > most * (rows + rejected):
        share = rejected / (rows + rejected)
        raise DataError(
            "\n".join([f"{share:.2%} of the lines are unreadable, more than {most:.2%} (--max-rejected)", *report.describe_rejected()])
        )


class _Days:
    """Where each day of a chronological log begins."""

    def __init__(self) -> None:
        self._last: int | None = None  # seconds
        self._begins = 0
        self._days = 0

    def see(self, path: Path, table: pa.Table, row: int) -> None:
        times = table["time"].to_numpy()
        if len(times) == 0:
            return
        steps = np.diff(times, prepend=times[0] if self._last is None else self._last)
        if (steps < 0).any():
            raise DataError(f"{path}: rows are not in time order; give the files in order of time, or --split a share instead of last-day")
        first_of_day = np.flatnonzero(np.diff(times // _DAY, prepend=-1 if self._last is None else self._last // _DAY))
        if len(first_of_day):
            self._begins = row + int(first_of_day[-1])
            self._days += len(first_of_day)
        self._last = int(times[-1])

    def last_begins(self) -> int:
        if self._days < 2:
            raise DataError("--split last-day: all rows are of one day; give a share such as 0.1")
        return self._begins


FORMATS: dict[str, Callable[[], Format]] = {"criteo": Criteo, "avazu": Avazu}
