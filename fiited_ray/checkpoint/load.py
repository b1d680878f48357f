"""From files back into a shard: of as many workers as wrote them, or of any other number.

Where the number is the same, every row goes back to its old address, so that a resumed run goes on to the last bit. Otherwise rows go
to whoever owns their bucket now. Of a chain of checkpoints the newest is read first; a row of an older one counts unless its address was
written later, or is none any more. At any time one file of rows is mapped beside the shard, and a bit for each address.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fiited_ray.checkpoint.manifest import CheckpointError, RowsFile
from fiited_ray.checkpoint.saved import Part, Saved
from fiited_ray.store import Rows, ShardSpec, VhpiShard
from fiited_ray.store.layout import buckets_of

_ROW_FIELDS = {
    "raw_ids": (torch.int64,),
    "tables": (torch.int32,),
    "widths": (torch.uint8,),
    "importance": (torch.float32,),
    "values": (torch.float32, torch.bfloat16, torch.float16),
    "state": (torch.float32,),
    "addresses": (torch.int32,),
}


def load_shard(saved: Saved, shard: VhpiShard) -> None:
    """Fill an empty shard with what belongs to it. Its limit is lifted: deal it anew, and hold a round if the rows pass the budget.

    Raises:
        CheckpointError: naming the file that is missing, damaged, or does not fit.
    """
    first, end = shard.spec.first_bucket, shard.spec.end_bucket
    own = [each for each in saved.parts if each.buckets == (first, end)]
    overlapping = [each for each in saved.parts if each.buckets[0] < end and first < each.buckets[1]]
    shard.set_limit(None)
    try:
        shard.restore(*(_own_state(own[0]) if own else _shared_state(saved, first == 0)))
        for part in overlapping:
            _load_sketch(saved, part, shard)
        if own:
            _check_counts(saved, own[0])
            shard.reserve(own[0].rows_by_width)
        for part in overlapping:
            _load_rows(saved, part.content["rank"], shard, placed=bool(own))
        shard.seal()
    except RuntimeError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{saved.folder.path}: {error}") from error


def _own_state(part: Part) -> tuple[list[int], float]:
    return part.state, part.content["threshold"]


def _shared_state(saved: Saved, first: bool) -> tuple[list[int], float]:
    """Another number of workers: clock and threshold are common to all; what was counted goes to the first."""
    clocks = {tuple(each.state[:2]) for each in saved.parts}
    if len(clocks) > 1:
        raise CheckpointError(f"{saved.folder.path}: its shards stand at different steps")
    step, lowered = clocks.pop()
    base = max(each.state[2] for each in saved.parts)
    counters = [sum(each.state[at] for each in saved.parts) if first else 0 for at in range(3, 11)]
    return [step, lowered, base, *counters], saved.training["threshold"]


def _load_sketch(saved: Saved, part: Part, shard: VhpiShard) -> None:
    """Sketch and distinct counter of the buckets that are this shard's now. A sketch of another size cannot be used and starts empty."""
    begin = max(part.buckets[0], shard.spec.first_bucket)
    end = min(part.buckets[1], shard.spec.end_bucket)
    taken = slice(begin - part.buckets[0], end - part.buckets[0])
    where = f"{saved.folder.path}/{part.shard.name}"
    with saved.folder.tensors(part.shard) as found:
        cells = tensor_of(found, "sketch", (torch.int16,), where)
        registers = tensor_of(found, "distinct", (torch.uint8,), where)
        buckets = part.buckets[1] - part.buckets[0]
        if cells.dim() != 2 or len(cells) != buckets or registers.shape != (buckets, 4):
            raise CheckpointError(f"{where}: its sketch is not one of {buckets} buckets")
        mine = cells[taken].contiguous()
        if mine.shape[1] != shard.spec.sketch_sets * 32:
            mine = torch.zeros(end - begin, shard.spec.sketch_sets * 32, dtype=torch.int16)
        shard.put_sketch(begin, mine, part.state[2], registers[taken].contiguous())


def _check_counts(saved: Saved, part: Part) -> None:
    """The rows a shard held cannot be more than the files have: memory is taken by their number."""
    rank = part.content["rank"]
    held = sum(part.rows_by_width)
    there = sum(file.rows for each in saved.chain() for file in each.parts[rank].files)
    sizes = sum(file.bytes for each in saved.chain() for file in each.parts[rank].files)
    if held > there or there > sizes:
        raise CheckpointError(
            f"{saved.folder.path}/part-{rank:05d}.json: names {held} rows, but its files of {sizes} bytes are said to hold {there}"
        )


def _load_rows(saved: Saved, rank: int, shard: VhpiShard, placed: bool) -> None:
    """Rows of one old shard that belong to this one now, newest checkpoint first."""
    chain = saved.chain()
    written = _Addresses(saved.parts[rank].rows_by_width, shard.spec) if len(chain) > 1 else None
    for level, each in enumerate(chain):
        part = each.parts[rank]
        for file in part.files:
            if file.first_bucket >= shard.spec.end_bucket or file.end_bucket <= shard.spec.first_bucket:
                continue
            where = f"{each.folder.path}/{file.name}"
            with each.folder.tensors(file) as tensors:
                rows, addresses = _rows_of(tensors, file, shard.spec, where)
                keep = _belonging(rows, file, shard.spec)
                if written is not None:
                    keep = _both(keep, written.open(addresses, where))
                try:
                    shard.put(*_picked(rows, addresses, keep, shard.spec), placed=placed)
                except RuntimeError as error:
                    raise CheckpointError(f"{where}: {error}") from error
                del tensors, rows, addresses  # they lie in the file, which is to be let go of before the next one
        if written is not None and level < len(chain) - 1:
            written.add(_changed(each, part))


class _Addresses:
    """Which addresses of an old shard have been read already, a byte for each; and which there are."""

    def __init__(self, rows_by_width: list[int], spec: ShardSpec) -> None:
        self._bits = 32 - (spec.chunks - 1).bit_length()
        self._seen = [np.zeros(min(rows, 1 << 32), bool) for rows in rows_by_width]

    def open(self, addresses: np.ndarray, where: str) -> np.ndarray:
        """bool: those not read yet that belong to a row now."""
        widths, positions = self._split(addresses)
        out = np.zeros(len(addresses), bool)
        for width, seen in enumerate(self._seen):
            at = np.flatnonzero((widths == width) & (positions < len(seen)))
            out[at] = ~seen[positions[at]]
        return out

    def add(self, addresses: np.ndarray) -> None:
        widths, positions = self._split(addresses)
        for width, seen in enumerate(self._seen):
            seen[positions[(widths == width) & (positions < len(seen))]] = True

    def _split(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = addresses.view(np.uint32).astype(np.int64)
        return wide >> self._bits, wide & ((1 << self._bits) - 1)


def _changed(saved: Saved, part: Part) -> np.ndarray:
    with saved.folder.tensors(part.shard) as found:
        return tensor_of(found, "changed", (torch.int32,), f"{saved.folder.path}/{part.shard.name}").numpy().copy()


def _rows_of(tensors: dict[str, Tensor], file: RowsFile, spec: ShardSpec, where: str) -> tuple[Rows, np.ndarray]:
    if tensors.keys() != _ROW_FIELDS.keys():
        raise CheckpointError(f"{where}: not a file of rows: it holds {', '.join(sorted(tensors))}")
    found = {name: tensor_of(tensors, name, dtypes, where) for name, dtypes in _ROW_FIELDS.items()}
    addresses = found.pop("addresses")
    rows = Rows(**found)
    for name in ("raw_ids", "tables", "widths", "importance"):
        if getattr(rows, name).shape != (file.rows,):
            raise CheckpointError(f"{where}: {name} has shape {list(getattr(rows, name).shape)} for {file.rows} rows")
    if addresses.shape != (file.rows,):
        raise CheckpointError(f"{where}: addresses has shape {list(addresses.shape)} for {file.rows} rows")
    if bool((rows.widths > spec.chunks).any()) or bool((rows.widths == 0).any()):
        raise CheckpointError(f"{where}: a row's width is not between 1 and {spec.chunks}")
    if bool(((rows.tables < 0) | (rows.tables >= spec.tables)).any()):
        raise CheckpointError(f"{where}: a row's table is not one of {spec.tables}")
    rows_by_width = torch.bincount(rows.widths, minlength=spec.chunks + 1)
    values = int((rows_by_width * torch.arange(spec.chunks + 1)).sum()) * spec.chunk
    state = int((rows_by_width * spec.state_sizes()).sum())
    if rows.values.shape != (values,) or rows.state.shape != (state,) or rows.values.dtype != spec.dtype:
        raise CheckpointError(
            f"{where}: {rows.values.dtype} values {list(rows.values.shape)} and state {list(rows.state.shape)}, but its rows need "
            f"{spec.dtype} values [{values}] and state [{state}]"
        )
    return rows, addresses.numpy()


def _belonging(rows: Rows, file: RowsFile, spec: ShardSpec) -> np.ndarray | None:
    """bool: which rows are this shard's; None when all are."""
    if spec.first_bucket <= file.first_bucket and file.end_bucket <= spec.end_bucket:
        return None
    buckets = buckets_of(rows.raw_ids.numpy(), rows.tables.numpy(), spec.seed)
    return (buckets >= spec.first_bucket) & (buckets < spec.end_bucket)


def _both(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    return other if one is None else one & other


def _picked(rows: Rows, addresses: np.ndarray, keep: np.ndarray | None, spec: ShardSpec) -> tuple[Rows, Tensor]:
    if keep is None or bool(keep.all()):
        return rows, torch.from_numpy(addresses)
    mask = torch.from_numpy(keep)
    widths = rows.widths.long()
    picked = Rows(
        rows.raw_ids[mask],
        rows.tables[mask],
        rows.widths[mask],
        rows.importance[mask],
        rows.values[mask.repeat_interleave(widths * spec.chunk)],
        rows.state[mask.repeat_interleave(spec.state_sizes()[widths])],
    )
    return picked, torch.from_numpy(addresses[keep])


def tensor_of(found: dict[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], where: str) -> Tensor:
    """A tensor of a file.

    Raises:
        CheckpointError: when it is missing or of another dtype.
    """
    if name not in found:
        raise CheckpointError(f"{where}: holds no {name}")
    if found[name].dtype not in dtypes:
        raise CheckpointError(f"{where}: {name} is {found[name].dtype}; {' or '.join(map(str, dtypes))} is wanted")
    return found[name]
