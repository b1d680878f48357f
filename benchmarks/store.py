"""The store's speed beside FBGEMM's and torch's tables, and beside what the memory allows.

    python benchmarks/store.py --json FILE [--dims 32 128] [--turns 48]
    python benchmarks/store.py --device cuda --json FILE     # on a GPU, see store_device.py

Synthetic ids: 26 tables, 4096 single-hot power-law ids of each in a batch, tables far larger than the last-level cache. A training
step is lookup, backward and fused row-wise Adagrad (torch: elementwise, the only sparse one it has). Systems take turns batch by
batch in one process; times are medians. Malloc keeps what is freed, as in a training run: otherwise a system's results are taken from
the system page by page, or not, by chance. `fbgemm-gpu-cpu` is optional: without it its columns are empty.

`bound` is the time that the bytes which must move would take at the highest copy bandwidth measured in the run: U*D*4 + N*D*4 forward, and
N*D*4 + 2*U*D*4 + 8*U backward, with N lookups and U distinct ids.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import store_device
import torch
from torch import Tensor, nn

from fiited_ray.allocator import keep_freed_memory
from fiited_ray.config import Config, DataConfig, EmbeddingConfig, PolicyConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.embedding import ShardedEmbedding
from fiited_ray.exchange import Solo
from fiited_ray.policy import RoundState, ShardReport
from fiited_ray.store import ShardSpec, VhpiShard

TABLES, BATCH, CHUNK, LR = 26, 4096, 8, 0.05
TABLE_BYTES = 1 << 30  # of the vectors of all tables
SKEW = 1.05  # rank r is drawn in proportion to r^-SKEW
SHARE = 0.1


class Workload:
    """Batches of power-law ids over `rows` rows in each table, the popular ones scattered all over it."""

    def __init__(self, dim: int, rows: int, batches: int) -> None:
        self.dim, self.rows = dim, rows
        random = np.random.default_rng(0)
        mass = np.cumsum(np.arange(1, rows + 1) ** -SKEW)
        self.ids: list[Tensor] = []
        for _ in range(batches):
            ranks = np.searchsorted(mass, random.random((TABLES, BATCH)) * mass[-1])
            scattered = (ranks * 2_654_435_761 + np.arange(TABLES)[:, None] * 40_503) % rows
            self.ids.append(torch.from_numpy(scattered.reshape(-1)))
        self.offsets = torch.arange(TABLES * BATCH + 1)
        self.grad_BFD = torch.randn(BATCH, TABLES, dim) * 1e-3
        of_table = torch.arange(TABLES).repeat_interleave(BATCH) * rows
        self.unique = statistics.mean(len(torch.unique(ids + of_table)) for ids in self.ids)

    def batch(self, ids: Tensor) -> Batch:
        return Batch(torch.zeros(BATCH, 0), torch.zeros(BATCH), ids, self.offsets)

    @property
    def lookup_bytes(self) -> float:
        return (self.unique + TABLES * BATCH) * self.dim * 4

    @property
    def step_bytes(self) -> float:
        return self.lookup_bytes + (TABLES * BATCH + 2 * self.unique) * self.dim * 4 + 8 * self.unique


class Ours:
    """One shard behind `ShardedEmbedding`, as in a training run of one worker."""

    def __init__(self, work: Workload, share: float | None) -> None:
        full = TABLES * work.rows * (work.dim * 4 + 4)
        self.budget = None if share is None else int(full * share)
        self.spec = _spec(work.dim, self.budget)
        self.shard = VhpiShard(self.spec)
        self.module = ShardedEmbedding(self.shard, Solo(), tuple(range(TABLES)), LR, False, self.budget)
        self.work = work
        if share is None:
            self._fill()
        else:
            self._settle()

    def _fill(self) -> None:
        """A row for every id."""
        self.module.train()
        with torch.no_grad():
            for begin in range(0, self.work.rows, BATCH):
                ids = torch.arange(begin, begin + BATCH).clamp(max=self.work.rows - 1).repeat(TABLES)
                self.module(self.work.batch(ids))

    def _settle(self) -> None:
        """Train with rounds until the budget is full and the widths have settled."""
        policy, threshold = PolicyConfig(), 0.0
        decider = LocalDecider(policy)
        _, row_bytes = self.spec.plan()
        for step in range(1, 8 * len(self.work.ids) + 1):
            self.step(self.work.ids[step % len(self.work.ids)])
            if step % 10 == 0:
                stats = self.shard.stats()
                report = ShardReport(self.shard.histogram().numpy(), stats.fixed, stats.admitted_bytes, stats.refused, None)
                decision = decider.decide(step, [report], RoundState(self.budget, threshold, self.spec.levels, row_bytes, 10, 10))
                if decision and not decision.skipped:
                    self.shard.resize(decision.thresholds[0])
                    threshold = decision.threshold
                self.shard.reset_round_counters()

    def lookup(self, ids: Tensor) -> None:
        self.module.eval()
        with torch.no_grad():
            self.module(self.work.batch(ids))

    def step(self, ids: Tensor) -> None:
        self.module.train()
        self.module(self.work.batch(ids)).backward(self.work.grad_BFD)


class Fbgemm:
    """FBGEMM's table-batched embedding on the CPU, row-wise Adagrad fused."""

    def __init__(self, work: Workload) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

        place = (work.rows, work.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
        kind = EmbOptimType.EXACT_ROWWISE_ADAGRAD
        self.module = SplitTableBatchedEmbeddingBagsCodegen([place] * TABLES, optimizer=kind, learning_rate=LR)
        self.offsets, self.grad = work.offsets, work.grad_BFD.reshape(BATCH, -1)

    def lookup(self, ids: Tensor) -> None:
        with torch.no_grad():
            self.module(ids, self.offsets)

    def step(self, ids: Tensor) -> None:
        self.module(ids, self.offsets).backward(self.grad)


class Torch:
    """torch.nn.EmbeddingBag with sparse gradients and torch.optim.Adagrad."""

    def __init__(self, work: Workload) -> None:
        self.tables = nn.ModuleList(nn.EmbeddingBag(work.rows, work.dim, mode="sum", sparse=True) for _ in range(TABLES))
        self.optimizer = torch.optim.Adagrad(self.tables.parameters(), lr=LR)
        self.offsets, self.grad = torch.arange(BATCH), work.grad_BFD

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        parts = ids.view(TABLES, BATCH)
        return torch.stack([table(part, self.offsets) for table, part in zip(self.tables, parts, strict=True)], 1)

    def step(self, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        self._forward(ids).backward(self.grad)
        self.optimizer.step()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy far larger than the caches, with this process's threads."""
    source = torch.ones(1 << 27)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds(lambda: target.copy_(source)) for _ in range(8))


def measure(dim: int, rounds: int, with_torch: bool) -> dict[str, Any]:
    """All systems at one dimension, in turns."""
    rows = TABLE_BYTES // (TABLES * dim * 4)
    work = Workload(dim, rows, batches=16)
    systems: dict[str, Any] = {"ours": Ours(work, None), "ours_10pct": Ours(work, SHARE)}
    missing: list[str] = []
    try:
        systems["fbgemm"] = Fbgemm(work)
    except ImportError as error:
        missing.append(f"fbgemm: {error}")
    if with_torch:
        systems["torch"] = Torch(work)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        half = len(work.ids) // 2  # a step's rows must not be in the cache from the lookup before it
        batches = {"lookup": work.ids[turn % len(work.ids)], "step": work.ids[(turn + half) % len(work.ids)]}
        for name, system in systems.items():
            for kind, ids in batches.items():
                if name in ("torch", "fbgemm") and kind == "step" and turn >= max(3, rounds // 8):
                    continue  # they take long, and vary little
                seconds = _seconds(getattr(system, kind), ids)
                times.setdefault((name, kind), []).append(seconds)
    middle = {key: statistics.median(values[1:]) for key, values in times.items()}
    stats = {name: systems[name].shard.stats() for name in ("ours", "ours_10pct")}
    step, lookup = middle["ours", "step"], middle["ours", "lookup"]

    def against(name: str, kind: str) -> float | None:
        return middle[name, kind] / middle["ours", kind] if (name, kind) in middle else None

    return {
        "dim": dim,
        "rows_per_table": rows,
        "lookups": TABLES * BATCH,
        "unique": work.unique,
        "threads": torch.get_num_threads(),
        "step_ms": {name: 1e3 * seconds for (name, kind), seconds in middle.items() if kind == "step"},
        "lookup_ms": {name: 1e3 * seconds for (name, kind), seconds in middle.items() if kind == "lookup"},
        "step_bytes": work.step_bytes,
        "lookup_bytes": work.lookup_bytes,
        "step_bytes_per_s": work.step_bytes / step,
        "lookup_bytes_per_s": work.lookup_bytes / lookup,
        "step_vs_fbgemm": against("fbgemm", "step"),
        "step_vs_torch": against("torch", "step"),
        "lookup_vs_fbgemm": against("fbgemm", "lookup"),
        "step_10pct_vs_full": step / middle["ours_10pct", "step"],
        "bytes_10pct_of_full": stats["ours_10pct"].total / stats["ours"].total,
        "metadata_bytes_per_row": stats["ours"].index / stats["ours"].rows,
        "metadata_bytes_per_row_10pct": stats["ours_10pct"].index / stats["ours_10pct"].rows,
        "slack_share_10pct": stats["ours_10pct"].slack / stats["ours_10pct"].total,
        "missing": missing,
    }


def metadata_by_fill(rows: int) -> list[tuple[int, float]]:
    """Index and header bytes per resident row while one shard fills, every sixteenth of the way from half on."""
    shard = VhpiShard(_spec(8, None))
    result = []
    for sixteenth in range(16):
        _admit(shard, sixteenth * rows // 16, (sixteenth + 1) * rows // 16)
        stats = shard.stats()
        if sixteenth >= 7:
            result.append((stats.rows, stats.index / stats.rows))
    return result


def round_seconds(rows: int, dim: int) -> dict[str, float]:
    """Rounds over `rows` resident rows on one thread: the first cut, that narrows or evicts most of what it can, and one after it.

    The later one, whose threshold is a quarter of an octave higher, is what a training run meets; it is `total`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shard = VhpiShard(_spec(dim, None))
    _admit(shard, 0, rows)
    threshold = _quantile(shard.histogram()[0].double(), 0.05)
    first = _seconds(shard.resize, threshold)
    before = shard.stats()
    histogram = _seconds(shard.histogram)
    shrink = _seconds(shard.shrink, threshold * 2**0.25)
    grow = _seconds(shard.grow)
    after = shard.stats()
    torch.set_num_threads(threads)
    return {
        "rows": before.rows,
        "dim": dim,
        "first_round": first,
        "histogram": histogram,
        "shrink": shrink,
        "grow": grow,
        "total": histogram + shrink + grow,
        "rows_changed": after.resized + after.evicted - before.resized - before.evicted,
        "bytes_given_back": before.total - after.total,
        "peak_bytes_over_before": after.peak / before.total,
        "slack_share_after": after.slack / after.total,
    }


def _quantile(counts: Tensor, share: float) -> float:
    """The importance below which `share` of the rows lie, by the histogram's bins."""
    reached = int((counts.cumsum(0) <= share * counts.sum()).sum())
    return 2.0 ** (reached / 32 - 44)


def _admit(shard: VhpiShard, begin: int, end: int) -> None:
    """Rows for the ids begin..end-1, with importances spread over some octaves."""
    from fiited_ray.store import ops

    for low in range(begin, end, 1 << 18):
        ids = torch.arange(low, min(end, low + (1 << 18)))
        found = ops.dedup_ids(ids, torch.tensor([len(ids)]), torch.zeros(1, dtype=torch.int32), 0, 1)
        answer = shard.lookup(found.keys, found.tables, found.counts, training=True)
        size = (torch.rand(len(ids), 1) * 8).exp2().repeat(1, shard.spec.dim)
        shard.update(answer, size.reshape(-1) * 1e-3, None, 1e-3, 1)


def _spec(dim: int, budget: int | None) -> ShardSpec:
    data = DataConfig(categorical=tuple(f"c{table}" for table in range(TABLES)))
    return ShardSpec.of(Config(data=data, embedding=EmbeddingConfig(dim=dim, chunk=CHUNK, eps=1e-8)), budget)


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def print_store(dims: dict[str, dict[str, Any]], bandwidths: list[float]) -> None:
    print(
        f"{'D':>4}{'':>10}{'ours ms':>10}{'10 % ms':>10}{'FBGEMM ms':>11}{'torch ms':>10}{'MB moved':>10}{'of copy':>9}"
        f"{'vs bound':>10}{'vs FBGEMM':>11}{'10 % gain':>11}"
    )
    for dim, figures in dims.items():
        for kind in ("step", "lookup"):
            times = figures[f"{kind}_ms"]
            cells = [f"{times[name]:.2f}" if name in times else "-" for name in ("ours", "ours_10pct", "fbgemm", "torch")]
            against = figures[f"{kind}_vs_fbgemm"]
            share = figures[f"{kind}_share_of_copy_bandwidth"]
            print(
                f"{dim:>4}{kind:>10}{cells[0]:>10}{cells[1]:>10}{cells[2]:>11}{cells[3]:>10}{figures[f'{kind}_bytes'] / 1e6:>10.1f}"
                f"{share:>9.1%}{1 / share:>10.2f}{'-' if against is None else f'{against:.2f}':>11}"
                f"{times['ours'] / times['ours_10pct']:>11.2f}"
            )
    any_dim = next(iter(dims.values()))
    copies = ", ".join(f"{each / 1e9:.1f}" for each in bandwidths)
    print(f"copy bandwidth {copies} GB/s with {any_dim['threads']} threads, of which the highest counts; synthetic power-law ids")
    for line in any_dim["missing"]:
        print(f"not measured: {line}")


def print_rounds(rounds: list[dict[str, float]]) -> None:
    print(f"{'rows':>12}{'D':>5}{'round s':>9}{'changed':>12}{'MB back':>9}{'slack':>8}{'first cut s':>13}  (one core)")
    for each in rounds:
        print(
            f"{each['rows']:>12,}{each['dim']:>5}{each['total']:>9.3f}{each['rows_changed']:>12,}{each['bytes_given_back'] / 1e6:>9.1f}"
            f"{each['slack_share_after']:>8.2%}{each['first_round']:>13.3f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "emulated"), default="cpu", help="other than cpu: see store_device.py")
    parser.add_argument("--dims", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=48, help="timed batches of each system")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--skip-rounds", action="store_true")
    parser.add_argument("--most-rows", type=int, default=100_000_000, help="of the curve of rounds: 92 bytes each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        on_device = store_device.run(arguments.device)
        if arguments.json:
            arguments.json.write_text(json.dumps(on_device, indent=1) + "\n")
        return 0
    keep_freed_memory()
    result: dict[str, Any] = {"synthetic": True, "dims": {}}
    bandwidths = [copy_bandwidth()]
    for dim in arguments.dims:
        figures = measure(dim, arguments.turns, not arguments.without_torch)
        gc.collect()
        if not arguments.skip_rounds:
            figures["round_10m"] = round_seconds(10_600_000, dim)  # 10 million are left after the first cut
            figures["round_seconds_10m"] = figures["round_10m"]["total"]
        result["dims"][str(dim)] = figures
        gc.collect()
        bandwidths.append(copy_bandwidth())
    result["copy_GB_per_s"] = [each / 1e9 for each in bandwidths]
    for figures in result["dims"].values():
        for kind in ("step", "lookup"):
            figures[f"{kind}_share_of_copy_bandwidth"] = figures[f"{kind}_bytes_per_s"] / max(bandwidths)
        figures["step_vs_bound"] = 1 / figures["step_share_of_copy_bandwidth"]
    print_store(result["dims"], bandwidths)
    if not arguments.skip_rounds:
        result["metadata_by_fill"] = metadata_by_fill(4_000_000)
        sizes = [rows for rows in (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000) if rows <= arguments.most_rows]
        result["rounds"] = [round_seconds(rows, 2 * CHUNK) for rows in sizes]
        worst = max(each for _, each in result["metadata_by_fill"])
        print(f"index and header while a shard fills from half on: at most {worst:.1f} bytes a row")
        print_rounds([*(each["round_10m"] for each in result["dims"].values()), *result["rounds"]])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
