"""`VhpiShard`: the Python face of one worker's store in the compiled extension.

Shapes: N lookups, U distinct keys, k chunks of c dimensions, D = k * c.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fiited_ray.store import ops
from fiited_ray.store.layout import ShardSpec
from fiited_ray.store.ops import Bags

ALL_KEYS = 1 << 32  # a quota of this many of 2**32 admits every key
ALL_ROWS = 2**63 - 1  # no piece has more


def backends() -> tuple[str, ...]:
    """Devices the compiled store runs on here: "cpu", "cuda"; empty when it was not built."""
    there = []
    for device in ("cpu", "cuda"):
        with suppress(ImportError):
            if device == "cpu" or torch.cuda.is_available():
                ops.ops(device)
                there.append(device)
    return tuple(there)


@dataclass(frozen=True)
class Lookup:
    """What a shard answers to U distinct keys."""

    keys: Tensor  # int64 [U]
    tables: Tensor  # int32 [U]
    counts: Tensor  # int32 [U]: lookups of the key in the global batch
    addresses: Tensor  # int32 [U]: valid until the next resize
    widths: Tensor  # uint8 [U]: chunks the row has now, 0 when there is none


@dataclass(frozen=True)
class ShardStats:
    """Bytes by part (their sum is `total`, and all that is allocated), rows and counters of one shard."""

    payload: int  # vectors
    optimizer: int  # optimizer state
    index: int  # hash table and row headers: key, importance, table
    sketch: int  # importance of absent ids, distinct counter
    slack: int  # free space in slabs, allocation rounding, slab pointers
    total: int
    planned: int  # upper bound of total that follows from the rows alone
    fixed: int  # planned bytes with no row
    limit: int  # 0: none
    peak: int  # largest total since the last call of stats()
    rows: int
    distinct: int  # ids met so far (HyperLogLog, about 1.6 % error)
    lookups: int  # while training, counted with repeats
    hits: int  # of these, how many found a row
    admitted: int  # this and the following: since reset_round_counters()
    refused: int
    resized: int
    evicted: int
    admitted_bytes: int
    asked_bytes: int  # of rows worth having, let in or not, since the store was made


@dataclass(frozen=True)
class Rows:
    """Rows outside the store. R rows, one behind the other in `values` and `state`; from `export_rows` ordered by key."""

    raw_ids: Tensor  # int64 [R]
    tables: Tensor  # int32 [R]
    widths: Tensor  # uint8 [R]
    importance: Tensor  # float32 [R]; from `take` times the shard's present scale
    values: Tensor  # float32 [sum of widths * c]; from `take` in the storage dtype
    state: Tensor  # float32: optimizer state, as many values per row as its width needs

    def tensors(self) -> dict[str, Tensor]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


class VhpiShard:
    """One worker's store, in the memory of the CPU or of a GPU.

    Args:
        spec: configuration; its buckets say which keys belong here.
        device: where rows are kept. Tensors of a step (`lookup` to `update`) are on that device, those of all else the CPU's:
            `histogram`, `rows_by_width`, `export_rows`, saving and loading (`changed` to `seal`).

    Raises:
        ImportError: when the store was not built for this device.
        RuntimeError: when the byte limit does not hold the fixed parts.
    """

    def __init__(self, spec: ShardSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.threshold = 0.0
        self._ops = ops.ops(self.device.type)
        self.pools_ids = hasattr(self._ops, "store_pool_ids")  # on CPUs
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._handle: int = self._ops.store_create(*spec.numbers())
        weakref.finalize(self, self._ops.store_destroy, self._handle)

    def lookup(
        self,
        keys: Tensor,
        tables: Tensor,
        counts: Tensor,
        *,
        training: bool,
        step: int = 0,
        quota: int = ALL_KEYS,
    ) -> Lookup:
        """Find the rows of U distinct keys; absent ones have width 0.

        While training at threshold 0, absent keys get a row of full width as long as there is room; of those only a share of
        quota / 2**32, chosen by hash, is let in.

        Args:
            keys: int64 [U]; tables: int32 [U]; counts: int32 [U], lookups of each key in the global batch.
        """
        answer = self._ops.store_lookup(self._handle, keys, tables, counts, training, step, quota)
        return Lookup(keys, tables, counts, *answer)

    def read(self, found: Lookup, take: Tensor | None = None) -> Tensor:
        """float32: the vectors of a lookup's rows, each width * c values, one behind the other; of rows `take` (int32 [M]) if given."""
        return self._ops.store_read(self._handle, found.addresses, found.widths, take)

    def pool(self, found: Lookup, bags: Bags) -> Tensor:
        """float32 [B, F, D]: a lookup's rows, pooled. The same as `ops.pool` over what `read` gives, in one go."""
        return self._ops.store_pool(
            self._handle, found.addresses, found.widths, bags.inverse, bags.offsets, bags.weights, bags.features, bags.mean
        )

    def pool_ids(self, ids: Tensor, offsets: Tensor, feature_tables: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
        """float32 [B, F, D]: the rows of ids, pooled, for reading alone. The same as dedup, `lookup` and `pool`, in one go.

        Only where `pools_ids` says so, and of a shard that owns all keys.

        Args:
            ids: int64 [N], feature by feature; offsets: int64 [F*B+1] of their bags; feature_tables: int32 [F]; weights: float32 [N].
        """
        return self._ops.store_pool_ids(self._handle, ids, offsets, feature_tables, weights, mean)

    def update_pooled(
        self, found: Lookup, grad_pooled: Tensor, bags: Bags, lookup_norms: Tensor | None, lr: float, step: int, quota: int = ALL_KEYS
    ) -> None:
        """`update` with the gradient of what `pool` gave, float32 [B, F, D]: the same as taking it through `ops.wire_gradients`."""
        self._ops.store_update_pooled(
            self._handle,
            *(found.keys, found.tables, found.addresses, found.widths, found.counts, grad_pooled),
            *(bags.inverse, bags.offsets, bags.weights, bags.features, bags.mean),
            *(lookup_norms, lr, step, quota),
        )

    def update(
        self,
        found: Lookup,
        gradients: Tensor,
        lookup_norms: Tensor | None,
        lr: float,
        step: int,
        quota: int = ALL_KEYS,
        target: Tensor | None = None,
    ) -> None:
        """Add importance and take an optimizer step.

        Args:
            gradients: float32, in the order of the keys, each width * c values and, where width < k, c more: the missing
                chunks folded into one. Of absent keys the first chunk's c values as they are.
            target: int32 [M]: M such gradients came, each for this one of the U keys; they are summed.
            lookup_norms: float32 [U] sum of the lookups' gradient norms; needed by importance `lookup_norm_sum` only.
            quota: share, of 2**32, of the absent keys worth a row that may get one now.

        Raises:
            RuntimeError: for a gradient that is not finite (naming table and id), or rows resized since their lookup.
        """
        self._ops.store_update(
            self._handle,
            *(found.keys, found.tables, found.addresses, found.widths, found.counts, gradients, target),
            *(lookup_norms, lr, step, quota),
        )

    def histogram(self) -> Tensor:
        """int64 [2, 2048]: rows, and their planned bytes, by importance bin."""
        return self._ops.store_histogram(self._handle)

    def shrink(self, threshold: float) -> int:
        """First half of a round: rows that earn less at this threshold are narrowed or evicted.

        Returns:
            planned bytes that `grow` will want.
        """
        self.threshold = threshold
        growth: int = self._ops.store_shrink(self._handle, threshold)
        return growth

    def grow(self) -> None:
        """Second half of a round: the other rows get the width they earn, as far as the limit allows."""
        self._ops.store_grow(self._handle)

    def resize(self, threshold: float) -> None:
        """A whole round: shrink, then grow."""
        self.shrink(threshold)
        self.grow()

    def set_limit(self, limit_bytes: int | None) -> None:
        """Bytes this shard may take from now on; what it has already taken stays. None: no limit."""
        self._ops.store_set_limit(self._handle, 0 if limit_bytes is None else max(1, limit_bytes))

    def stats(self) -> ShardStats:
        return ShardStats(*self._ops.store_stats(self._handle).tolist())

    def rows_by_width(self) -> Tensor:
        """int64 [tables, k]: rows of width 1..k."""
        return self._ops.store_rows_by_width(self._handle)

    def reset_round_counters(self) -> None:
        self._ops.store_reset_round_counters(self._handle)

    def export_rows(self, first_bucket: int = 0, end_bucket: int = 1024) -> Rows:
        return Rows(*self._ops.store_export(self._handle, first_bucket, end_bucket))

    def changed(self, every: bool, most: int = ALL_ROWS) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows stand that were written or moved since the last call, or all rows; they count as saved from now on.

        Args:
            most: rows in a piece of consecutive virtual buckets; only a single bucket may have more.

        Returns:
            int32 addresses, piece by piece and within it as the rows stand, valid until the next update; int64 [pieces] each, the
            bucket before which each ends, and how many rows it has.
        """
        addresses, ends, counts = self._ops.store_changed(self._handle, every, most)
        return addresses, ends, counts

    def take(self, addresses: Tensor) -> Rows:
        """A copy of the rows at these addresses as they are held: scaled importance, vectors in the storage dtype."""
        return Rows(*self._ops.store_take(self._handle, addresses))

    def state(self) -> list[int]:
        """The shard's clock, sketch level and counters, for `restore`."""
        return self._ops.store_state(self._handle).tolist()

    def sketch(self) -> tuple[Tensor, Tensor]:
        """Copies of the sketch, int16 [buckets, sets * 32], and of the distinct counter, uint8 [buckets, 4]."""
        cells, registers = self._ops.store_sketch(self._handle)
        return cells, registers

    def restore(self, state: list[int], threshold: float) -> None:
        """First step of a load, into a shard without rows: what `state` gave, and the threshold then in force."""
        self._ops.store_restore(self._handle, state, threshold)
        self.threshold = threshold

    def put_sketch(self, first_bucket: int, cells: Tensor, base: int, registers: Tensor) -> None:
        """Load sketch and distinct counter of some buckets, from a sketch with this level."""
        self._ops.store_put_sketch(self._handle, first_bucket, cells, base, registers)

    def reserve(self, rows_by_width: list[int]) -> None:
        """Make room for rows that come back to their old addresses."""
        self._ops.store_reserve(self._handle, rows_by_width)

    def put(self, rows: Rows, addresses: Tensor | None = None, placed: bool = False) -> None:
        """Load rows that `take` gave: `placed` at the addresses they had, otherwise behind the others.

        Raises:
            RuntimeError: naming the row that is foreign, doubled, malformed or does not fit.
        """
        self._ops.store_put(self._handle, *rows.tensors().values(), addresses if placed else None)

    def seal(self) -> None:
        """Last step of a load.

        Raises:
            RuntimeError: when a row that there is room for did not come.
        """
        self._ops.store_seal(self._handle)

    def check(self) -> None:
        """Verify every invariant of the store; for tests and debugging, slow.

        Raises:
            RuntimeError: naming the invariant that does not hold.
        """
        self._ops.store_check(self._handle)
