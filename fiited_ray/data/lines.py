"""Delimited text in blocks: files opened whatever their compression, lines cut into fields, numbers read; whole blocks at a time.

A block holds the bytes of many lines; a field is a pair of positions in them. No text is ever made into Python objects by line.
"""

from __future__ import annotations

import gzip
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fiited_ray.data.errors import DataError

Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BLOCK_BYTES = 16 << 20
_LONGEST_LINE = 64 << 20
_PAD = 24  # zero bytes before the first line: a number is read as the words that end where it ends
_WORD = 8
_KEEP = np.array([(2**64 - 1) << (8 * pad) & (2**64 - 1) for pad in range(_WORD)] + [0], np.uint64)  # all but the first `pad` bytes
_ZEROS = ~_KEEP & np.uint64(0x3030303030303030)
_WRONG = 255
_TOP_BITS = np.uint64(0x8080808080808080)  # set in a word where one of its bytes is _WRONG


@dataclass(frozen=True)
class Block:
    """Whole lines of a file: line i is content[starts[i] : ends[i]], without its line end."""

    path: Path
    first_line: int  # its number in the file, from 1
    content: npt.NDArray[np.uint8]
    starts: Positions
    ends: Positions

    def text(self, line: int) -> bytes:
        return self.content[self.starts[line] : self.ends[line]].tobytes()

    def without_first(self) -> Block:
        return Block(self.path, self.first_line + 1, self.content, self.starts[1:], self.ends[1:])

    def not_utf8(self) -> Mask:
        """Lines that are not UTF-8; only lines with bytes beyond ASCII are decoded."""
        suspects = np.unique(np.searchsorted(self.starts, np.flatnonzero(self.content > 127), side="right") - 1)
        wrong = np.zeros(len(self.starts), bool)
        for line in suspects[suspects >= 0]:
            try:
                self.text(line).decode()
            except UnicodeDecodeError:
                wrong[line] = True
        return wrong

    def fields(self, separator: bytes, columns: int) -> tuple[Positions, Positions, Positions]:
        """Cut lines at separators.

        Returns:
            number of fields of each line [lines]; starts and ends of the fields [r, columns] of the r lines that have `columns`.
        """
        at = np.flatnonzero(self.content == separator[0])
        first, last = np.searchsorted(at, self.starts), np.searchsorted(at, self.ends)
        counts = last - first + 1
        right = counts == columns
        cuts = at[first[right, None] + np.arange(columns - 1)] if columns > 1 else np.zeros((int(right.sum()), 0), np.int64)
        return counts, np.column_stack([self.starts[right], cuts + 1]), np.column_stack([cuts, self.ends[right]])


class Progress:
    """One line on stderr: how much of the input is read. Rewritten in a terminal, now and then a new one elsewhere."""

    def __init__(self, total_bytes: int, stream: IO[str] | None = None) -> None:
        self.total, self.done = max(total_bytes, 1), 0
        self._stream = sys.stderr if stream is None else stream
        self._begun = self._last = time.monotonic()

    def show(self, at: int, rows: int, last: bool = False) -> None:
        """at: bytes of the current file; rows: lines accepted so far."""
        now, terminal = time.monotonic(), self._stream.isatty()
        if not last and now - self._last < (0.5 if terminal else 30):
            return
        self._last = now
        share = min((self.done + at) / self.total, 1.0)
        line = f"{share:6.1%}  {rows:,} rows  {rows / max(now - self._begun, 1e-9):,.0f} rows/s"
        print(f"\r{line}" if terminal else line, end="\n" if last or not terminal else "", file=self._stream, flush=True)


def read_blocks(path: Path, progress: Progress, rows: Any = lambda: 0, block_bytes: int = _BLOCK_BYTES) -> Iterator[Block]:
    """The lines of a file, plain, gzip or zstd by its first bytes. A byte order mark and CR before LF are taken off.

    Args:
        rows: called for the number of rows to show beside the progress.

    Raises:
        DataError: naming the file, when it is unreadable, cut short, or not text.
    """
    with _opened(path) as (raw, stream):
        rest, line = b"", 1
        while True:
            piece = _read(path, stream, block_bytes)
            data = rest + piece
            if line == 1 and rest == b"":
                data = _without_mark(path, data)
            cut = data.rfind(b"\n") + 1 if piece else len(data)
            if cut == 0 and len(data) > _LONGEST_LINE:
                raise DataError(f"{path}: no line end in {_LONGEST_LINE >> 20} MiB; this is not a text file of lines")
            if cut:
                block = _block(path, line, data[:cut])
                yield block
                line += len(block.starts)
            rest = data[cut:]
            progress.show(raw.tell(), rows())
            if not piece:
                break
    progress.done += path.stat().st_size


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Any]]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic[:2] == b"\x1f\x8b":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif magic == b"\x28\xb5\x2f\xfd":
            yield raw, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        elif magic[:2] == b"PK":
            raise DataError(f"{path}: a zip archive; unpack it first")
        else:
            yield raw, raw


def _read(path: Path, stream: Any, count: int) -> bytes:
    try:
        return bytes(stream.read(count))
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is cut short; fetch it again") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}; fetch it again") from error


def _without_mark(path: Path, data: bytes) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; convert it to UTF-8")
    if data[257:262] == b"ustar":
        raise DataError(f"{path}: a tar archive; unpack it first")
    return data.removeprefix(b"\xef\xbb\xbf")


def _block(path: Path, first_line: int, data: bytes) -> Block:
    content = np.frombuffer(bytes(_PAD) + data, np.uint8)
    ends = np.flatnonzero(content == 10)
    if data[-1:] != b"\n":
        ends = np.append(ends, len(content))
    starts = np.concatenate([[_PAD], ends[:-1] + 1])
    carriage = (content[ends - 1] == 13) & (ends > starts)
    return Block(path, first_line, content, starts, ends - carriage)


def parse_decimal(content: npt.NDArray[np.uint8], starts: Positions, ends: Positions) -> tuple[npt.NDArray[np.int64], Mask]:
    """Whole numbers of at most 18 digits, with a minus sign or none.

    Returns:
        values int64, and where the field is not such a number; an empty field is 0 and not wrong.
    """
    negative = (content[np.minimum(starts, len(content) - 1)] == ord("-")) & (ends > starts)
    values, wrong = _parse(content, ends, ends - starts - negative, 10, 18)
    wrong |= negative & (ends - starts == 1)
    return np.where(negative, -values, values), wrong


def parse_hex(content: npt.NDArray[np.uint8], starts: Positions, ends: Positions) -> tuple[npt.NDArray[np.int64], Mask]:
    """Hexadecimal numbers of at most 8 digits, as `parse_decimal`."""
    return _parse(content, ends, ends - starts, 16, 8)


def _digit_table(base: int) -> npt.NDArray[np.uint8]:
    table = np.full(256, _WRONG, np.uint8)
    for digit, letter in enumerate("0123456789abcdef"[:base]):
        table[ord(letter)] = table[ord(letter.upper())] = digit
    return table


_DIGITS = {base: _digit_table(base) for base in (10, 16)}


def _parse(content: npt.NDArray[np.uint8], ends: Positions, lengths: Positions, base: int, most: int) -> tuple[npt.NDArray[np.int64], Mask]:
    """Eight digits at a time, from the right: the word that ends with the field, with zeros for what lies before it."""
    words = np.ndarray((max(len(content) - _WORD + 1, 0),), "<u8", content, strides=(1,))
    values = np.zeros(ends.shape, np.int64)
    wrong = lengths > most
    scale = 1
    for done in range(0, min(int(lengths.max(initial=0)), most), _WORD):
        pad = np.clip(_WORD - (lengths - done), 0, _WORD)
        word = words[np.maximum(ends - done - _WORD, 0)] & _KEEP[pad] | _ZEROS[pad]
        digits = _DIGITS[base][np.ascontiguousarray(word).view(np.uint8)].reshape(*ends.shape, _WORD)
        joined = digits.view("<u8")[..., 0]
        wrong |= (joined & _TOP_BITS) != 0
        values += _join(joined, base) * scale
        scale *= base**_WORD
    values[wrong] = 0
    return values, wrong


def _join(digits: npt.NDArray[np.uint64], base: int) -> npt.NDArray[np.int64]:
    """The number whose eight digits are the bytes of a word, the first one lowest: pairs, then fours, then all eight."""
    with np.errstate(over="ignore"):
        for width, mask in ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF)):
            digits = (digits * np.uint64(base**width) + (digits >> np.uint64(8 * width))) & np.uint64(mask)
    return digits.astype(np.int64)
