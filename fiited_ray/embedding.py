"""`ShardedEmbedding`: ids in, pooled vectors out, over stores that many workers own.

    ids -> dedup -> all-to-all -> dedup again, counts summed -> store lookup
    vectors <- pad and pool <- all-to-all, ragged at live width <-'
    gradient of the vectors -> live dimensions and a folded rest -> all-to-all -> summed -> fused update

Shapes: B rows, F features, N lookups, U distinct keys here, M keys asked of this worker, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fiited_ray.data.batch import Batch
from fiited_ray.exchange import Exchange, splits
from fiited_ray.policy import shard_limit
from fiited_ray.store import ops
from fiited_ray.store.shard import ALL_KEYS, Lookup, VhpiShard

_MORE = 1.5  # a step may ask for this much more than the last one did
_SPARE_ROWS = 64  # room for shards where more than the even part of the rows asks


@dataclass
class PhaseTimes:
    """Seconds by phase since the last reset; a profiler sees each phase as a range of that name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with record_function(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class StepTotals:
    """What all workers together know at the start of a step."""

    rows: int  # of the global batch
    lookups: int
    planned_bytes: int
    refused: int  # times a row was turned away for want of room since the last round
    asked_bytes: int  # of rows worth having, let in or not, since the start


@dataclass(frozen=True)
class _Routed:
    """One lookup's way, kept for its backward."""

    found: Lookup  # of the M' distinct keys this worker owns
    owner_inverse: Tensor | None  # int32 [M]; None where there is one worker and nothing to merge
    widths: Tensor  # uint8 [U]
    bags: ops.Bags
    send: list[int]
    receive: list[int]
    quota: int


class ShardedEmbedding(nn.Module):
    """All embedding tables of a model.

    In training mode a backward pass updates the store: there is no optimizer step to call. Gradients of several workers are
    averaged, as DistributedDataParallel does with dense ones.

    Args:
        shard: this worker's part of the store.
        exchange: the way to the other workers.
        feature_tables: table number of each of the F features.
        lr: learning rate of the fused optimizer.
        mean: pool bags by their mean, not their sum.
        budget_bytes: of all shards together.
        ceiling_bytes: most that this worker may take of it.
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
    ) -> None:
        super().__init__()
        self.shard = shard
        self.exchange = exchange
        self.lr = lr
        self.mean = mean
        self.budget_bytes = budget_bytes
        self.ceiling_bytes = ceiling_bytes
        self.times = times or PhaseTimes()
        self.step = 0  # training batches seen
        self.totals: StepTotals | None = None  # of the last training batch
        self._peak_bytes = 0
        self._full_row_bytes = shard.spec.plan()[1][-1]
        self._anchor = torch.zeros((), requires_grad=True)  # gives autograd a reason to call the backward
        self.register_buffer("_feature_tables", torch.tensor(feature_tables, dtype=torch.int32), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Vectors float32 [B, F, D]; ids without a row read as zeros. All workers must call this together."""
        pooled, routed = self._read(batch)
        if not self.training:
            return pooled
        return cast(Tensor, _Update.apply(pooled, self._anchor, self, routed))  # type: ignore[no-untyped-call]

    @property
    def crowded(self) -> bool:
        """Whether rows have been turned away for want of room since the last round, as all workers knew at the last step."""
        return self.totals is not None and self.totals.refused > 0

    def take_peak(self) -> int:
        """Most bytes this worker's shard has taken since the last call."""
        peak, self._peak_bytes = self._peak_bytes, 0
        return peak

    def _read(self, batch: Batch) -> tuple[Tensor, _Routed]:
        feature_tables = cast(Tensor, self._feature_tables)
        features = len(feature_tables)
        rows = (batch.offsets.numel() - 1) // features
        with self.times.phase("route"):
            ends = batch.offsets[rows::rows] if rows else torch.zeros(features, dtype=torch.int64)
            local = ops.dedup_ids(batch.ids, ends.contiguous(), feature_tables, self.shard.spec.seed, self.exchange.workers)
            send = local.splits.tolist()
            receive, totals = self._greet(send, rows, batch.ids.numel())
            keys, tables, counts, owner_inverse = self._ask(local, send, receive)
        with self.times.phase("gather"):
            if self.training:
                self.step += 1
            quota = self._quota(totals) if self.training else 0
            found = self.shard.lookup(keys, tables, counts, training=self.training, step=self.step, quota=quota)
            spec = self.shard.spec
            bags = ops.Bags(local.inverse, batch.offsets, batch.weights, features, self.mean, spec.chunk, spec.chunks)
            if owner_inverse is None:
                widths, pooled = found.widths, self.shard.pool(found, bags)
            else:
                widths, values = self._answer(found, owner_inverse, send, receive)
                pooled = ops.pool(values, widths, bags)
        return pooled, _Routed(found, owner_inverse, widths, bags, send, receive, quota)

    def _greet(self, send: list[int], rows: int, lookups: int) -> tuple[list[int], StepTotals]:
        """Tell every worker how many keys it will be asked for, and share the totals."""
        stats = self.shard.stats()
        self._peak_bytes = max(self._peak_bytes, stats.peak)
        mine = [rows, lookups, stats.planned, stats.refused, stats.asked_bytes]
        table = torch.tensor([[count, *mine] for count in send])
        ones = [1] * self.exchange.workers
        told = self.exchange.all_to_all(table, ones, ones)
        totals = StepTotals(*told[:, 1:].sum(0).tolist())
        if self.training and self.budget_bytes is not None:  # an even part of the room that is left goes to each shard
            limit = shard_limit(self.budget_bytes, stats.planned, totals.planned_bytes, self.exchange.workers, self.ceiling_bytes)
            self.shard.set_limit(limit)
        return told[:, 0].tolist(), totals

    def _ask(self, local: ops.Deduped, send: list[int], receive: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.exchange.workers == 1:
            return local.keys, local.tables, local.counts, None
        wanted = torch.stack([local.keys, (local.tables.long() << 32) | local.counts.long()], 1)
        asked = self.exchange.all_to_all(wanted, send, receive)
        return ops.dedup_keys(asked[:, 0].contiguous(), (asked[:, 1] >> 32).int(), asked[:, 1].int())

    def _quota(self, totals: StepTotals) -> int:
        """Share, of 2**32, of the keys worth a row that may get one at this step without passing the budget.

        It follows from the totals alone, so that the rows let in do not depend on the number of workers: the room there is against
        what was asked for at the last step, or against a row for every lookup where that is not known yet.
        """
        before, self.totals = self.totals, totals
        if self.budget_bytes is None:
            return ALL_KEYS
        room = self.budget_bytes - totals.planned_bytes - _SPARE_ROWS * self._full_row_bytes
        asked = totals.asked_bytes - before.asked_bytes if before else totals.lookups * self._full_row_bytes
        return min(ALL_KEYS, max(0, room) * ALL_KEYS // max(1, int(_MORE * asked)))

    def _answer(self, found: Lookup, owner_inverse: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, Tensor]:
        """Send the rows asked for, at their width; returns what came for the U keys: widths [U], values."""
        chunk = self.shard.spec.chunk
        asked_widths = found.widths[owner_inverse]
        values = self.shard.read(found, owner_inverse)
        widths = self.exchange.all_to_all(asked_widths, receive, send)
        value_send = splits(asked_widths.long() * chunk, receive)
        value_receive = splits(widths.long() * chunk, send)
        return widths, self.exchange.all_to_all(values, value_send, value_receive)

    def _learn(self, grad_pooled: Tensor, routed: _Routed) -> None:
        """Take the gradient of the pooled vectors [B, F, D] to the rows' owners, who update."""
        spec = self.shard.spec
        grad_pooled = grad_pooled.contiguous()
        if self.exchange.workers == 1:
            with self.times.phase("update"):
                norms = self._lookup_norms(grad_pooled, routed)
                self.shard.update_pooled(routed.found, grad_pooled, routed.bags, norms, self.lr, self.step, routed.quota)
            return
        assert routed.owner_inverse is not None
        with self.times.phase("route"):
            grad_pooled = grad_pooled / self.exchange.workers
            gradients = ops.wire_gradients(grad_pooled, routed.widths, routed.bags)
            norms = self._lookup_norms(grad_pooled, routed)
            asked_widths = routed.found.widths[routed.owner_inverse]
            send = splits(ops.gradient_sizes(routed.widths, spec.chunk, spec.chunks), routed.send)
            receive = splits(ops.gradient_sizes(asked_widths, spec.chunk, spec.chunks), routed.receive)
            arrived = self.exchange.all_to_all(gradients, send, receive)
            if norms is not None:
                arrived_norms = self.exchange.all_to_all(norms, routed.send, routed.receive)
                norms = torch.zeros(routed.found.widths.numel()).index_add_(0, routed.owner_inverse, arrived_norms)
        with self.times.phase("update"):
            self.shard.update(routed.found, arrived, norms, self.lr, self.step, routed.quota, routed.owner_inverse)

    def _lookup_norms(self, grad_pooled: Tensor, routed: _Routed) -> Tensor | None:
        if self.shard.spec.importance != "lookup_norm_sum":
            return None
        return ops.lookup_norms(grad_pooled, routed.widths.numel(), routed.bags)


class _Update(torch.autograd.Function):
    """Passes the pooled vectors on, and hands their gradient to the store."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, anchor: Tensor, module: ShardedEmbedding, routed: _Routed) -> Tensor:
        ctx.module, ctx.routed = module, routed
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.module._learn(grads[0], ctx.routed)
        return None, None, None, None
