"""What a run tells: the stores' state over all workers as metrics with stable names, and their history for the plots."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fiited_ray.config import Config
from fiited_ray.exchange import Exchange
from fiited_ray.methods import store_tables
from fiited_ray.store import VhpiShard
from fiited_ray.store.layout import dense_row_bytes

_PARTS = ("payload", "optimizer", "index", "sketch", "slack", "total")


@dataclass(frozen=True)
class StoreTotals:
    """All shards together."""

    bytes: dict[str, int]  # by part, and total
    peak_bytes: int  # sum of the shards' largest totals since the last report: never below the largest sum
    distinct: int
    lookups: int  # since the start, counted with repeats
    hits: int
    rows_by_width: np.ndarray  # int64 [tables, chunks]
    chunk: int

    @staticmethod
    def gather(shard: VhpiShard, peak_bytes: int, exchange: Exchange, distinct_ids: int | None = None) -> StoreTotals:
        """Sum over all workers, who all call this. `distinct_ids`: their number, where the store does not see the ids themselves."""
        stats = shard.stats()
        mine = [*(getattr(stats, part) for part in _PARTS), max(peak_bytes, stats.peak), stats.distinct, stats.lookups, stats.hits]
        numbers = torch.cat([torch.tensor(mine), shard.rows_by_width().flatten()])
        summed = exchange.all_reduce(numbers).tolist()
        parts, (peak, distinct, lookups, hits), rows = summed[:6], summed[6:10], summed[10:]
        by_width = np.asarray(rows, np.int64).reshape(shard.spec.tables, shard.spec.chunks)
        distinct = distinct if distinct_ids is None else distinct_ids
        return StoreTotals(dict(zip(_PARTS, parts, strict=True)), peak, distinct, lookups, hits, by_width, shard.spec.chunk)

    def metrics(self, config: Config, budget_bytes: int | None, before: tuple[int, int]) -> dict[str, float]:
        """Values by name; `before`: lookups and hits at the last report."""
        dense_equivalent = self.distinct * dense_row_bytes(config.embedding)
        widths = self.rows_by_width.sum(0)
        parameters = float((widths * np.arange(1, len(widths) + 1)).sum() * self.chunk)
        lookups, hits = self.lookups - before[0], self.hits - before[1]
        values = {f"bytes/{part}": float(size) for part, size in self.bytes.items()}
        values |= {
            "bytes/peak": float(self.peak_bytes),
            "bytes/dense_equivalent": float(dense_equivalent),
            "bytes/ratio": self.bytes["total"] / max(1, dense_equivalent),
            "parameters/kept_share": min(
                1.0, parameters / max(1, self.distinct * config.embedding.dim)
            ),  # the distinct count is an estimate
            "rows/total": float(widths.sum()),
            "lookup/hit_rate": hits / lookups if lookups else float("nan"),
        }
        if budget_bytes is not None:
            values["bytes/budget"] = float(budget_bytes)
        values |= {f"rows/width_{width + 1}": float(count) for width, count in enumerate(widths)}
        tables = zip(store_tables(config), self.rows_by_width.sum(1), strict=True)
        values |= {f"rows/table/{table}": float(count) for table, count in tables}
        return values


@dataclass
class History:
    """What rank 0 keeps of a run for its plots."""

    reported: int = 0  # steps whose loss has been reported
    steps: list[int] = field(default_factory=list)
    # Of doubles: 8 bytes a number, where a list's take 32. A name that the latest reports lack ends with the last one that had it.
    values: dict[str, array[float]] = field(default_factory=dict)
    widths: list[np.ndarray] = field(default_factory=list)  # rows by table and width, int64 [tables, chunks], at the same steps
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, since this worker began
    importance: tuple[float, np.ndarray] | None = None  # threshold and rows by importance bin, at the last round

    @property
    def last(self) -> dict[str, float]:
        """The latest report."""
        return {name: series[-1] for name, series in self.values.items() if len(series) == len(self.steps)}

    def at_all_steps(self) -> dict[str, array[float]]:
        """Values by name, [steps] each; NaN at steps whose report lacked the name: its last ones after a resume with other settings."""
        lacking = array("d", [float("nan")])
        return {name: series + lacking * (len(self.steps) - len(series)) for name, series in self.values.items()}

    def add_seconds(self, phases: Mapping[str, float]) -> None:
        """Add seconds by phase to those of the run."""
        for phase, seconds in phases.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def add(self, step: int, values: Mapping[str, float], rows_by_width: np.ndarray) -> None:
        """Add a report; a name that reports before this one lacked, at first or in between, is NaN there."""
        for name, value in values.items():
            series = self.values.setdefault(name, array("d"))
            series.extend([float("nan")] * (len(self.steps) - len(series)))
            series.append(value)
        self.steps.append(step)
        self.widths.append(rows_by_width)
