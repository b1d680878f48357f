"""`ShardedEmbedding`: ids in, pooled vectors out, over stores that many workers own.

    ids -> dedup -> all-to-all -> dedup again, counts summed -> store lookup
    vectors <- pad and pool <- all-to-all, ragged at live width <-'
    gradient of the vectors -> live dimensions and a folded rest -> all-to-all -> summed -> fused update

Shapes: B rows, F features, N lookups, U distinct keys here, M keys asked of this worker, M' of them distinct, D dimensions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fiited_ray.data.batch import Batch
from fiited_ray.exchange import Exchange, splits
from fiited_ray.policy import shard_limit
from fiited_ray.store import ops
from fiited_ray.store.shard import ALL_KEYS, Lookup, ShardStats, VhpiShard

_MORE = 1.5  # a step may ask for this much more than the last one did
LONGEST_GRADIENT = 1e12  # that is learned from: the squares of sums of many such are still finite
_SPARE_ROWS = 64  # room for shards where more than the even part of the rows asks


def annotated(name: str) -> AbstractContextManager[Any]:
    """A range of a profiler's trace, where one is recording this thread."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


@dataclass
class PhaseTimes:
    """Seconds by phase since they were last taken; one thread may add while another takes. A profiler sees each phase as a range."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with annotated(name):
                yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """What there is; counting goes on from 0, also in a phase that then does not occur."""
        with self._lock:
            taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken


@dataclass(frozen=True)
class StepTotals:
    """What all workers together know of their stores at the start of a step."""

    planned_bytes: int
    refused: int  # times a row was turned away for want of room since the last round
    asked_bytes: int  # of rows worth having, let in or not, since the start


@dataclass(frozen=True)
class Route:
    """Which worker asks which for which keys of one batch. It follows from the data alone, so that it can be made ahead of the step."""

    rows: int  # of the global batch
    lookups: int  # of the global batch
    inverse: Tensor  # int32 [N]: position among the U
    send: list[int]  # of the U keys, how many each worker owns
    receive: list[int]  # of the M keys, how many each worker asks for
    keys: Tensor  # int64 [M']: distinct keys asked of this worker; their tables and counts
    tables: Tensor  # int32 [M']
    counts: Tensor  # int32 [M']
    owner_inverse: Tensor | None  # int32 [M]: position among the M'; None where there is one worker and nothing to merge

    def to(self, device: torch.device) -> Route:
        """The route with its tensors in a device's memory."""
        names = (
            ("inverse", "keys", "tables", "counts")
            if self.owner_inverse is None
            else ("inverse", "keys", "tables", "counts", "owner_inverse")
        )
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class _Reading:
    """One lookup, kept for its backward."""

    route: Route
    found: Lookup  # of the M' distinct keys this worker owns
    widths: Tensor  # uint8 [U]
    bags: ops.Bags
    quota: int


class ShardedEmbedding(nn.Module):
    """All embedding tables of a model.

    In training mode a backward pass updates the store: there is no optimizer step to call. Gradients of several workers are added.

    Args:
        shard: this worker's part of the store.
        exchange: the way to the other workers.
        feature_tables: table number of each of the F features.
        lr: learning rate of the fused optimizer.
        mean: pool bags by their mean, not their sum.
        budget_bytes: of all shards together.
        ceiling_bytes: most that this worker may take of it.
        skip_not_finite: a bag whose gradient is not finite, or longer than 1e12, is counted and teaches nothing; else it is an error.
    """

    def __init__(
        self,
        shard: VhpiShard,
        exchange: Exchange,
        feature_tables: tuple[int, ...],
        lr: float,
        mean: bool,
        budget_bytes: int | None = None,
        ceiling_bytes: int | None = None,
        times: PhaseTimes | None = None,
        skip_not_finite: bool = False,
    ) -> None:
        super().__init__()
        self.shard = shard
        self.exchange = exchange
        self.lr = lr
        self.mean = mean
        self.budget_bytes = budget_bytes
        self.ceiling_bytes = ceiling_bytes
        self.times = times or PhaseTimes()
        self.skip_not_finite = skip_not_finite
        self._skipped_bags = torch.zeros(1, dtype=torch.int64)  # counted where the gradients are
        self.stop_asked = False  # this worker is to end
        self.stop_agreed = False  # some worker is, as all of them know since the last training batch
        self.step = 0  # training batches seen
        self.totals: StepTotals | None = None  # of the last training batch
        self.admits = True  # whether ids without a row may get one
        self._peak_bytes = 0
        self._full_row_bytes = shard.spec.plan()[1][-1]
        self._anchor = torch.zeros((), requires_grad=True)  # gives autograd a reason to call the backward
        self._tables: Tensor  # int32 [F]
        self.register_buffer("_tables", torch.tensor(feature_tables, dtype=torch.int32), persistent=False)

    def route(self, batch: Batch, exchange: Exchange | None = None) -> Route:
        """First half of a reading, which does not touch the store: dedup, and tell the owners. All workers must call this together.

        It runs where the batch is, on the CPU or on the store's device.

        Args:
            exchange: the way to take; a thread other than the training loop's needs one of its own.
        """
        exchange = exchange or self.exchange
        features = len(self._tables)
        rows = (batch.offsets.numel() - 1) // features
        ends = batch.offsets[rows::rows] if rows else batch.offsets.new_zeros(features)
        local = ops.dedup_ids(
            self.ids_of(batch), ends.contiguous(), self._tables.to(batch.ids.device), self.shard.spec.seed, exchange.workers
        )
        if exchange.workers == 1:
            all_of_them = [len(local.keys)]
            return Route(rows, len(batch.ids), local.inverse, all_of_them, all_of_them, local.keys, local.tables, local.counts, None)
        send = local.splits.tolist()
        ones = [1] * exchange.workers
        wanted = torch.stack([local.keys, (local.tables.long() << 32) | local.counts.long()], 1)
        mine = torch.tensor([[rows, len(batch.ids)]] * exchange.workers)
        told, asked, receive = exchange.all_to_all_with(mine, ones, ones, wanted, send)
        merged = ops.dedup_keys(asked[:, 0].contiguous(), (asked[:, 1] >> 32).int(), asked[:, 1].int())
        all_rows, all_lookups = told.sum(0).tolist()
        if all_lookups >= 2**31:  # counts of lookups are 32-bit numbers
            raise ValueError(f"a global batch has {all_lookups:,} ids; fewer than 2**31 are possible: lower train.batch_size")
        return Route(all_rows, all_lookups, local.inverse, send, receive, *merged)

    def ids_of(self, batch: Batch) -> Tensor:
        """int64 [N]: the ids under which the rows of a batch stand."""
        return batch.ids

    def forward(self, batch: Batch, route: Route | None = None) -> Tensor:
        """Vectors float32 [B, F, D]; ids without a row read as zeros. All workers must call this together.

        Args:
            route: the batch's, where it has been made ahead.
        """
        if route is None and not self.training and self.exchange.workers == 1 and self.shard.pools_ids:
            with self.times.phase("gather"):
                return self.shard.pool_ids(self.ids_of(batch), batch.offsets, self._tables, batch.weights, self.mean)
        if route is None:
            with self.times.phase("route"):
                route = self.route(batch)
        with self.times.phase("gather"):
            pooled, reading = self._read(batch, route)
        if not self.training:
            return pooled
        return cast(Tensor, _Update.apply(pooled, self._anchor, self, reading))  # type: ignore[no-untyped-call]

    @property
    def skipped_bags(self) -> int:
        """Bags whose gradient was not finite, of this worker's."""
        return int(self._skipped_bags)

    @skipped_bags.setter
    def skipped_bags(self, bags: int) -> None:
        self._skipped_bags.fill_(bags)

    @property
    def crowded(self) -> bool:
        """Whether rows have been turned away for want of room since the last round, as all workers knew at the last step."""
        return self.totals is not None and self.totals.refused > 0

    def stats(self) -> ShardStats:
        """The shard's numbers; their peak, which the shard then forgets, is noted."""
        stats = self.shard.stats()
        self.note_peak(stats.peak)
        return stats

    def take_peak(self) -> int:
        """Most bytes this worker's shard has taken since the last call."""
        peak, self._peak_bytes = self._peak_bytes, 0
        return peak

    def peak(self) -> int:
        """Most bytes this worker's shard has taken since `take_peak`, which goes on from there."""
        self.stats()
        return self._peak_bytes

    def note_peak(self, peak_bytes: int) -> None:
        """Count bytes that were taken at some time since `take_peak`."""
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def _read(self, batch: Batch, route: Route) -> tuple[Tensor, _Reading]:
        quota = self._open_step(route) if self.training else 0
        quota = quota if self.admits else 0
        found = self.shard.lookup(route.keys, route.tables, route.counts, training=self.training, step=self.step, quota=quota)
        spec = self.shard.spec
        bags = ops.Bags(route.inverse, batch.offsets, batch.weights, len(self._tables), self.mean, spec.chunk, spec.chunks)
        if route.owner_inverse is None:
            widths, pooled = found.widths, self.shard.pool(found, bags)
        else:
            widths, values = self._answer(found, route.owner_inverse, route.send, route.receive)
            pooled = ops.pool(values, widths, bags)
        return pooled, _Reading(route, found, widths, bags, quota)

    def _open_step(self, route: Route) -> int:
        """Share what the stores hold, deal the room that is left, an even part to each; returns the step's quota.

        This belongs to the step and not to its route: limits follow from what the last step and the last round have left.
        """
        self.step += 1
        stats = self.stats()
        mine = torch.tensor([stats.planned, stats.refused, stats.asked_bytes, int(self.stop_asked)])
        *numbers, stops = self.exchange.all_reduce(mine).tolist()
        totals, self.stop_agreed = StepTotals(*numbers), stops > 0
        if self.budget_bytes is not None:
            limit = shard_limit(self.budget_bytes, stats.planned, totals.planned_bytes, self.exchange.workers, self.ceiling_bytes)
            self.shard.set_limit(limit)
        return self._quota(totals, route.lookups)

    def _quota(self, totals: StepTotals, lookups: int) -> int:
        """Share, of 2**32, of the keys worth a row that may get one at this step without passing the budget.

        It follows from the totals alone, so that the rows let in do not depend on the number of workers: the room there is against
        what was asked for at the last step, or against a row for every lookup where that is not known yet.
        """
        before, self.totals = self.totals, totals
        if self.budget_bytes is None:
            return ALL_KEYS
        room = self.budget_bytes - totals.planned_bytes - _SPARE_ROWS * self._full_row_bytes
        asked = totals.asked_bytes - before.asked_bytes if before else lookups * self._full_row_bytes
        return min(ALL_KEYS, max(0, room) * ALL_KEYS // max(1, int(_MORE * asked)))

    def _answer(self, found: Lookup, owner_inverse: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, Tensor]:
        """Send the rows asked for, at their width; returns what came for the U keys: widths [U], values."""
        asked_widths = found.widths[owner_inverse]
        values = self.shard.read(found, owner_inverse)
        of_asker = splits(asked_widths.long() * self.shard.spec.chunk, receive)
        widths, arrived, _ = self.exchange.all_to_all_with(asked_widths, receive, send, values, of_asker)
        return widths, arrived

    def _learn(self, grad_pooled: Tensor, reading: _Reading) -> None:
        """Take the gradient of the pooled vectors [B, F, D] to the rows' owners, who update."""
        spec, route = self.shard.spec, reading.route
        grad_pooled = grad_pooled.contiguous()
        if self.skip_not_finite:  # in place: no other part of a model is handed this gradient
            self._skipped_bags = self._skipped_bags.to(grad_pooled.device) + ops.clear_odd(grad_pooled, LONGEST_GRADIENT)
        if self.exchange.workers == 1:
            with self.times.phase("update"):
                norms = self._lookup_norms(grad_pooled, reading)
                self.shard.update_pooled(reading.found, grad_pooled, reading.bags, norms, self.lr, self.step, reading.quota)
            return
        assert route.owner_inverse is not None
        with self.times.phase("route"):
            gradients = ops.wire_gradients(grad_pooled, reading.widths, reading.bags)
            norms = self._lookup_norms(grad_pooled, reading)
            of_owner = splits(ops.gradient_sizes(reading.widths, spec.chunk, spec.chunks), route.send)
            beside = gradients.new_empty(reading.widths.numel(), 0) if norms is None else norms
            arrived_beside, arrived, _ = self.exchange.all_to_all_with(beside, route.send, route.receive, gradients, of_owner)
            if norms is not None:
                norms = arrived_beside.new_zeros(reading.found.widths.numel()).index_add_(0, route.owner_inverse, arrived_beside)
        with self.times.phase("update"):
            self.shard.update(reading.found, arrived, norms, self.lr, self.step, reading.quota, route.owner_inverse)

    def _lookup_norms(self, grad_pooled: Tensor, reading: _Reading) -> Tensor | None:
        if self.shard.spec.importance != "lookup_norm_sum":
            return None
        return ops.lookup_norms(grad_pooled, reading.widths.numel(), reading.bags)


class _Update(torch.autograd.Function):
    """Passes the pooled vectors on, and hands their gradient to the store."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, anchor: Tensor, module: ShardedEmbedding, reading: _Reading) -> Tensor:
        ctx.module, ctx.reading = module, reading
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.module._learn(grads[0], ctx.reading)
        return None, None, None, None
