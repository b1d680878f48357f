"""Arrow tables to batches: strings hashed, columns crossed and binned, lists laid flat. Whole columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fiited_ray.config import DataConfig
from fiited_ray.data.batch import Batch
from fiited_ray.data.errors import DataError
from fiited_ray.store.ops import host_ops

NULL_ID = -(2**63)  # the id of a missing categorical value


class Collator:
    """Turns tables with a config's columns into batches.

    Null means missing: an id of its own in a categorical column, an empty bag in a list column, 0 (after the transform) in a
    dense one. A bag has as many weights as ids; with `data.weights` named for some features, the ids of all others weigh 1.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.columns = replace(config, time=None).columns  # the time is not part of a batch
        self.key = (config.seed + 2**63) % 2**64 - 2**63  # of the hash, as the operators take it

    def __call__(self, table: pa.Table, where: str = "batch", skipped: Callable[[DataError, int], None] | None = None) -> Batch:
        """Make a batch.

        Args:
            table: rows with at least the config's columns.
            where: file or source, for error messages.
            skipped: told, with `data.bad_rows=skip`, of each fault (row: in the table as it was given) and how many rows it cost.

        Raises:
            DataError: naming source, column, row and value.
        """
        if self.config.bad_rows == "error":
            return self._batch(table, where)
        at, given = np.arange(table.num_rows), table.num_rows
        while True:  # a turn for each kind of fault there is: all rows that have it leave together
            try:
                return replace(self._batch(table, where), skipped=given - len(at))
            except DataError as error:
                if error.rows is None or error.row is None:
                    raise
                if skipped is not None:
                    skipped(DataError(str(error), int(at[error.row])), int(error.rows.sum()))
                at, table = at[~error.rows], table.filter(pa.array(~error.rows))

    def strictly(self, table: pa.Table) -> Batch:
        """Make a batch, whatever `data.bad_rows` says of faults.

        Raises:
            DataError: naming column, row and value.
        """
        return self._batch(table, "rows")

    def _batch(self, table: pa.Table, where: str) -> Batch:
        config, rows, columns = self.config, table.num_rows, _columns(table, self.columns)
        lists = {name: _lists(columns[name], name, where, self.key) for name in config.multi_hot}
        weights = {name: _weights(columns[column], column, name, lists[name][1], where) for name, column in config.weights.items()}
        singles = len(config.categorical) * rows
        lookups = singles + sum(len(each) for each, _ in lists.values())
        ids = torch.empty(lookups + len(config.cross) * rows, dtype=torch.int64)

        scalars = ids[:singles].view(len(config.categorical), rows)
        self._scalars(columns, config.categorical, scalars, where)
        if lists:
            torch.cat([each for each, _ in lists.values()], out=ids[singles:lookups])
        if config.cross:
            others = config.scalar[len(config.categorical) :]
            more = torch.empty(len(others), rows, dtype=torch.int64)
            self._scalars(columns, others, more, where)
            of = dict(zip(config.scalar, [*scalars, *more], strict=True))
            for crossed, (first, *rest) in zip(ids[lookups:].view(len(config.cross), rows), config.cross, strict=True):
                crossed.copy_(of[first])
                for name in rest:
                    crossed.copy_(host_ops().cross_ids(crossed, of[name], self.key))

        weighted = None
        if weights:
            of_lists = [weights[name] if name in weights else torch.ones(len(each)) for name, (each, _) in lists.items()]
            weighted = torch.cat([torch.ones(singles), *of_lists, torch.ones(len(ids) - lookups)])
        offsets = _offsets(singles, [lengths for _, lengths in lists.values()], len(ids) - lookups)
        labels = _labels(columns[config.label], config.label, where)
        return Batch(self._dense(columns, rows, where), labels, ids, offsets, weighted)

    def _scalars(self, columns: Mapping[str, pa.Array], names: Sequence[str], out: Tensor, where: str) -> None:
        """Fill int64 [names, rows] with the ids of columns with one id a row."""
        quick, values = [], out.numpy()
        for number, name in enumerate(names):
            if name not in self.config.bins:
                array = columns[name]
                if pa.types.is_integer(array.type) and not array.null_count:  # the most common ones, without a copy between
                    np.copyto(values[number], array.to_numpy(), casting="unsafe")
                    quick.append(number)
                    continue
            out[number] = self._ids(columns, name, where)
        least = values.min(axis=1, initial=0)
        for number in quick:
            if least[number] == NULL_ID:  # written as an id, which is an error where the column could hold a null
                out[number] = self._ids(columns, names[number], where)

    def _ids(self, columns: Mapping[str, pa.Array], name: str, where: str) -> Tensor:
        if name not in self.config.bins:
            return _scalar_ids(columns[name], name, where, self.key)
        derived = self.config.bins[name]
        column = pc.cast(columns[derived.column], pa.float64(), safe=False)
        values = np.floor(column.fill_null(0.0).to_numpy(zero_copy_only=False) / derived.width)
        bad = ~(np.abs(values) < 2.0**63)  # NaN, infinite, or no int64
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{where}: column {derived.column!r}, row {row}: {column[row]} cannot be binned; leave the value null if it is missing",
                row,
                bad,
            )
        ids = torch.from_numpy(values.astype(np.int64))
        return _mark_nulls(ids, column)

    def _dense(self, columns: Mapping[str, pa.Array], rows: int, where: str) -> Tensor:
        values = np.empty((len(self.config.dense), rows), np.float32)
        nulls = np.zeros(len(values), np.int64)
        for number, name in enumerate(self.config.dense):
            column = columns[name]
            nulls[number] = column.null_count
            column = column if column.type == pa.float32() else pc.cast(column, pa.float32(), safe=False)
            values[number] = column.to_numpy(zero_copy_only=False)  # NaN where it is null
        odd = ~np.isfinite(values)
        if odd.any():
            for number in (np.count_nonzero(odd, axis=1) != nulls).nonzero()[0]:
                name = self.config.dense[number]
                wrong = odd[number] & ~columns[name].is_null().to_numpy(zero_copy_only=False)
                row = int(wrong.argmax())
                raise DataError(
                    f"{where}: dense column {name!r}, row {row}: {values[number, row]}; "
                    "clean the data, or leave the value null if it is missing",
                    row,
                    wrong,
                )
            np.copyto(values, 0, where=odd)
        if self.config.dense_transform == "log1p":
            np.log1p(np.maximum(values, 0, out=values), out=values)
        return torch.from_numpy(values).t().contiguous()


def _columns(table: pa.Table, names: Sequence[str]) -> dict[str, pa.Array]:
    """These columns of a table, each in one piece."""
    found = {}
    for name in names:
        column = table[name]
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        found[name] = array if isinstance(array, pa.Array) else pa.array([], column.type)
    return found


def _offsets(singles: int, lists: Sequence[Tensor], more_singles: int) -> Tensor:
    """int64 [bags+1]: where each bag begins: bags of one id, then those of so many ids as the lists tell, then again bags of one."""
    bags = singles + sum(map(len, lists)) + more_singles
    offsets = torch.empty(bags + 1, dtype=torch.int64)
    torch.arange(singles, out=offsets[:singles])
    bag = begin = singles
    for lengths in lists:
        mine = offsets[bag : bag + len(lengths)]
        torch.cumsum(lengths, 0, out=mine)
        end = begin + (int(mine[-1]) if len(mine) else 0)
        mine.sub_(lengths).add_(begin)
        bag, begin = bag + len(mine), end
    torch.arange(begin, begin + more_singles + 1, out=offsets[bag:])
    return offsets


def _scalar_ids(array: pa.Array, name: str, where: str, key: int, lengths: Tensor | None = None) -> Tensor:
    """int64 [n]: integers as they are (unsigned 64-bit ones by their bits), strings by their keyed hash, null as NULL_ID.

    lengths: how many of the entries belong to each row, where it is not one.
    """
    ids, reserved = _ids_of(array, name, where, key)
    if reserved is not None and bool(reserved.any()):
        faulty = torch.zeros(len(ids) if lengths is None else len(lengths), dtype=torch.bool)
        faulty[reserved if lengths is None else _owners(lengths)[reserved]] = True
        row, text = int(faulty.nonzero()[0]), "2**63" if pa.types.is_uint64(array.type) else "-2**63"
        raise DataError(
            f"{where}: column {name!r}, row {row}: the id {text} stands for a missing value; write null instead", row, faulty.numpy()
        )
    return ids


def _ids_of(array: pa.Array, name: str, where: str, key: int) -> tuple[Tensor, Tensor | None]:
    """(ids, which of them are written as the id that stands for null; None where none can be)."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        entries, reserved = _ids_of(array.dictionary, name, where, key)
        at = _integers(array.indices.fill_null(0))
        taken = entries[at] if len(entries) else torch.zeros(len(array), dtype=torch.int64)
        if reserved is not None:
            reserved = reserved[at] & torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False)) if len(entries) else None
        return _mark_nulls(taken, array), reserved
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _mark_nulls(_hash_strings(array, key), array), None
    if pa.types.is_boolean(kind):
        array = pc.cast(array, pa.int8())
    elif not pa.types.is_integer(kind):
        raise DataError(
            f"{where}: column {name!r} is {kind}; ids are integers or strings"
            + (" (bin it with data.bins)" if pa.types.is_floating(kind) else "")
        )
    ids = _integers(array.fill_null(0) if array.null_count else array)
    wide = kind in (pa.int64(), pa.uint64()) and len(ids) and int(ids.min()) == NULL_ID
    reserved = ids == NULL_ID if wide else None
    return _mark_nulls(ids, array), reserved


def _integers(array: pa.Array) -> Tensor:
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).astype(np.int64))


def _mark_nulls(ids: Tensor, array: pa.Array) -> Tensor:
    if array.null_count:
        ids[torch.from_numpy(array.is_null().to_numpy(zero_copy_only=False))] = NULL_ID
    return ids


def _hash_strings(array: pa.Array, key: int) -> Tensor:
    """int64 hashes, straight from Arrow's offsets and bytes."""
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if len(array) == 0 or offsets is None:
        return torch.empty(0, dtype=torch.int64)
    starts = np.frombuffer(offsets, np.int64 if large else np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    content = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    content = content[starts[0] : starts[-1]]
    bytes_ = torch.frombuffer(content, dtype=torch.uint8) if content.size else torch.empty(0, dtype=torch.uint8)
    hashed: Tensor = host_ops().hash_strings(torch.from_numpy(starts - starts[0]), bytes_, key)
    return hashed


def _lists(array: pa.Array, name: str, where: str, key: int) -> tuple[Tensor, Tensor]:
    """(ids of all bags one behind the other, bag lengths int64 [rows])."""
    values, lengths = _flat(array, name, where, "a multi_hot column holds lists")
    return _scalar_ids(values, name, where, key, lengths), lengths


def _owners(lengths: Tensor) -> Tensor:
    """int64 [sum of lengths]: the row of each entry."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _flat(array: pa.Array, name: str, where: str, wanted: str) -> tuple[pa.Array, Tensor]:
    """(values of all lists one behind the other, lengths int64 [rows]); a null list is an empty one."""
    kind = array.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{where}: column {name!r} is {kind}; {wanted}")
    lengths = pc.list_value_length(array)
    lengths = torch.from_numpy((lengths.fill_null(0) if array.null_count else lengths).to_numpy(zero_copy_only=False).astype(np.int64))
    return array.flatten(), lengths


def _weights(array: pa.Array, name: str, feature: str, bag_lengths: Tensor, where: str) -> Tensor:
    """float32 [sum of bag_lengths]: a weight for each id of a multi-hot feature."""
    values, lengths = _flat(array, name, where, f"the weights of {feature!r} are lists of numbers")
    unequal = lengths != bag_lengths
    if bool(unequal.any()):
        row = int(unequal.nonzero()[0])
        raise DataError(
            f"{where}: column {name!r} (data.weights.{feature}), row {row} has {lengths[row]} weights for {bag_lengths[row]} ids of "
            f"{feature!r}; every id needs one",
            row,
            unequal.numpy(),
        )
    try:
        numbers = pc.cast(values, pa.float32(), safe=False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise DataError(f"{where}: column {name!r} is {array.type}; the weights of {feature!r} are lists of numbers") from None
    weights = torch.from_numpy(numbers.fill_null(np.nan).to_numpy(zero_copy_only=False).copy())
    odd = ~torch.isfinite(weights)
    if bool(odd.any()):
        at = int(odd.nonzero()[0])
        owners = _owners(lengths)
        row, rows = int(owners[at]), torch.zeros(len(array), dtype=torch.bool)
        rows[owners[odd]] = True
        given = "null" if not numbers[at].is_valid else f"{weights[at]}"
        message = f"{where}: column {name!r} (data.weights.{feature}), row {row}: {given}; every id needs a finite weight"
        raise DataError(message, row, rows.numpy())
    return weights


def _labels(array: pa.Array, name: str, where: str) -> Tensor:
    if array.null_count:
        missing = array.is_null().to_numpy(zero_copy_only=False)
        row = int(missing.argmax())
        raise DataError(f"{where}: label column {name!r}, row {row} is null; every row needs a label of 0 or 1", row, missing)
    values = pc.cast(array, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    odd = (values != 0) & (values != 1)
    if odd.any():
        row = int(odd.argmax())
        raise DataError(f"{where}: label column {name!r}, row {row}: {values[row]}; labels are 0 or 1", row, odd)
    return torch.from_numpy(values.copy())
