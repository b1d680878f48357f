"""The store's speed on a GPU, against the bytes that must move: `benchmarks/store.py --device cuda --json FILE`.
Without Ray: `benchmarks/store_device.py cuda FILE`.

Synthetic ids. Times are medians between CUDA events, batches already on the device, dedup included where it says `step`. The device
is kept busy until the host has launched what is timed, as it is in a training loop; in a step, the host waits for the device twice.
Bytes by the counts of N lookups and U distinct ids of width D (float32), K state numbers for each value:

    find     64 B index line + 16 B header + 8 B key + 5 B answer, each key        gather   2 * U*D*4
    step     U*D*4 + N*D*4 forward, N*D*4 + 2*U*D*4*(1 + K) backward, and 8*U with row-wise Adagrad

`--device emulated` runs the same on the CPU, through the emulated sources: it shows that the benchmark works, its times say nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiited_ray.config import Config, DataConfig, EmbeddingConfig
from fiited_ray.store import ShardSpec, VhpiShard, _extension, ops
from fiited_ray.store.shard import Lookup

CHUNK = 8
CHUNKED_ADMISSION = 1 << 20
LAUNCHING_CYCLES = 500_000  # a quarter of a millisecond


@dataclass(frozen=True)
class Sizes:
    rows: int  # resident in the store of the steps
    lookups: int
    unique: int
    round_rows: int
    turns: int


FULL = Sizes(rows=4_000_000, lookups=1_050_000, unique=350_000, round_rows=100_000_000, turns=20)
EMULATED = Sizes(rows=20_000, lookups=6_000, unique=2_000, round_rows=30_000, turns=2)


class Batch:
    """Ids of one feature, in bags of one."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.ends = torch.tensor([len(ids)], device=ids.device)
        self.tables = torch.zeros(1, dtype=torch.int32, device=ids.device)
        self.offsets = torch.arange(len(ids) + 1, device=ids.device)


class Bench:
    """One device, its clock and its copy bandwidth."""

    def __init__(self, device: str) -> None:
        self.emulated = device == "emulated"
        if self.emulated:
            _extension.NAMESPACES["cpu"] = "fiited_emulated"
        elif not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no GPU here")
        self.device = torch.device("cpu" if self.emulated else device)
        self.sizes = EMULATED if self.emulated else FULL
        self.name = "emulated on the CPU" if self.emulated else torch.cuda.get_device_name(self.device)
        source = torch.ones((1 << 20) if self.emulated else (1 << 28), device=self.device)
        target = torch.empty_like(source)
        self.copy_bandwidth = 2 * source.numel() * 4 / self.seconds(lambda: target.copy_(source))

    def seconds(self, call: Callable[[], object]) -> float:
        """Median over the turns."""
        return statistics.median(self.once(call) for _ in range(self.sizes.turns + 2)[2:])

    def once(self, call: Callable[[], object]) -> float:
        if self.emulated:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LAUNCHING_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def shard(self, dim: int, optimizer: str, rows: int) -> VhpiShard:
        """A store with rows 0..rows-1 of one table."""
        config = Config(data=DataConfig(categorical=("id", "none")), embedding=EmbeddingConfig(dim=dim, chunk=CHUNK, optimizer=optimizer))  # type: ignore[arg-type]
        shard = VhpiShard(ShardSpec.of(config, None), self.device)
        for begin in range(0, rows, CHUNKED_ADMISSION):
            ids = torch.arange(begin, min(rows, begin + CHUNKED_ADMISSION), device=self.device)
            found = self.look_up(shard, Batch(ids), training=True)[0]
            size = (torch.rand(len(ids), 1, device=self.device) * 8).exp2().repeat(1, dim)
            shard.update(found, (size * 1e-3).reshape(-1), None, 1e-3, 1)
        return shard

    def look_up(self, shard: VhpiShard, batch: Batch, training: bool, step: int = 1) -> tuple[Lookup, ops.Bags]:
        """Dedup and lookup."""
        local = ops.dedup_ids(batch.ids, batch.ends, batch.tables, shard.spec.seed, 1)
        found = shard.lookup(local.keys, local.tables, local.counts, training=training, step=step)
        return found, ops.Bags(local.inverse, batch.offsets, None, 1, False, shard.spec.chunk, shard.spec.chunks)

    def against(self, seconds: float, bytes_moved: float) -> dict[str, float]:
        return {
            "ms": 1e3 * seconds,
            "MB_moved": bytes_moved / 1e6,
            "share_of_copy_bandwidth": bytes_moved / seconds / self.copy_bandwidth,
        }


def find(bench: Bench) -> dict[str, float]:
    shard = bench.shard(64, "rowwise_adagrad", bench.sizes.rows)
    ids = torch.randperm(bench.sizes.rows, device=bench.device)[: bench.sizes.rows // 4]
    found, _ = bench.look_up(shard, Batch(ids), training=False)
    seconds = bench.seconds(lambda: shard.lookup(found.keys, found.tables, found.counts, training=False))
    return bench.against(seconds, len(ids) * 93.0) | {"billion_keys_per_s": len(ids) / seconds / 1e9}


def gather(bench: Bench, dim: int) -> dict[str, float]:
    shard = bench.shard(dim, "rowwise_adagrad", bench.sizes.rows)
    ids = torch.randperm(bench.sizes.rows, device=bench.device)[: bench.sizes.unique]
    found, bags = bench.look_up(shard, Batch(ids), training=False)
    return bench.against(bench.seconds(lambda: shard.pool(found, bags)), 2.0 * len(ids) * dim * 4)


def step(bench: Bench, optimizer: str, dim: int = 128) -> dict[str, Any]:
    """A training step at full width, and again when rounds have cut the vectors and their state to a tenth of the bytes."""
    sizes = bench.sizes
    shard = bench.shard(dim, optimizer, sizes.rows)
    every = torch.randperm(sizes.rows, device=bench.device)[: sizes.unique]
    popular = (torch.rand(sizes.lookups - sizes.unique, device=bench.device) ** 4 * sizes.unique).long()
    batch = Batch(torch.cat([every, every[popular]])[torch.randperm(sizes.lookups, device=bench.device)])
    grad = torch.randn(sizes.lookups, 1, dim, device=bench.device) * 1e-3
    steps = iter(range(2, 1_000_000))

    def train() -> None:
        number = next(steps)
        found, bags = bench.look_up(shard, batch, training=True, step=number)
        shard.pool(found, bags)
        shard.update_pooled(found, grad, bags, None, 1e-3, number)

    moments = {"adam": 2, "adagrad": 1}.get(optimizer, 0)
    moved = (sizes.unique + 2 * sizes.lookups + 2 * sizes.unique * (1 + moments)) * dim * 4 + (0 if moments else 8 * sizes.unique)
    full = bench.against(bench.seconds(train), moved)
    before = shard.stats()
    threshold = 1e-6
    while (stats := shard.stats()).payload + stats.optimizer > 0.1 * (before.payload + before.optimizer):
        threshold *= 2**0.25
        shard.resize(threshold)
    narrow = bench.seconds(train)
    return full | {
        "times_bound": 1 / full["share_of_copy_bandwidth"],
        "ms_at_a_tenth": 1e3 * narrow,
        "full_over_a_tenth": full["ms"] / (1e3 * narrow),
    }


def round_times(bench: Bench) -> dict[str, float]:
    """The first cut, which is the largest, and a later round."""
    shard = bench.shard(2 * CHUNK, "rowwise_adagrad", bench.sizes.round_rows)
    rows = shard.histogram()[0].double()
    threshold = 2.0 ** (int((rows.cumsum(0) <= 0.05 * rows.sum()).sum()) / 32 - 44)
    first = bench.once(lambda: shard.resize(threshold))
    before = shard.stats().rows
    histogram = bench.once(shard.histogram)
    resize = bench.once(lambda: shard.resize(threshold * 2**0.25))
    return {"rows": before, "first_cut_ms": 1e3 * first, "histogram_ms": 1e3 * histogram, "round_ms": 1e3 * (histogram + resize)}


def run(device: str) -> dict[str, Any]:
    """All of it, as `store.py` writes it; prints a table."""
    bench = Bench(device)
    result: dict[str, Any] = {"synthetic": True, "device": bench.name, "copy_GB_per_s": bench.copy_bandwidth / 1e9}
    result["find_D64"] = find(bench)
    for dim in (64, 128):
        result[f"gather_D{dim}"] = gather(bench, dim)
    for optimizer in ("rowwise_adagrad", "adam"):
        result[f"step_D128_{optimizer}"] = step(bench, optimizer)
    result["round"] = round_times(bench)
    print(f"{bench.name}; copy bandwidth {result['copy_GB_per_s']:.0f} GB/s; synthetic ids")
    print(f"{'':>28}{'ms':>10}{'MB moved':>11}{'of copy':>9}")
    for name, figures in result.items():
        if isinstance(figures, dict) and "MB_moved" in figures:
            more = {key: value for key, value in figures.items() if key in ("billion_keys_per_s", "times_bound", "full_over_a_tenth")}
            words = "  ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in more.items())
            print(f"{name:>28}{figures['ms']:>10.3f}{figures['MB_moved']:>11.1f}{figures['share_of_copy_bandwidth']:>9.1%}  {words}")
    print(f"{'round':>28}{result['round']['round_ms']:>10.3f} ms over {result['round']['rows']:,.0f} rows")
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(sys.argv[1]), indent=1) + "\n")
