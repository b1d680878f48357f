"""Does memory stay flat? Trains for long on ids that never stop being new and watches the resident memory of each process.

    python benchmarks/soak.py --minutes 20 --json FILE

Synthetic: popularity is a power law whose ranks move on through the ids, so that the store admits, evicts and resizes all the time. The
worker processes run the training loop without Ray, and log to nothing; the parent reads their resident memory from /proc.
Bound: a worker's resident memory at the end is at most what it was before its store held anything, plus the budget, plus `ALLOWED`.
The slope is that of a straight line through the second half of the samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fiited_ray.allocator import keep_freed_memory
from fiited_ray.config import Config, DataConfig, ModelConfig, PolicyConfig, TrackingConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.exchange import make_exchange
from fiited_ray.train.loop import Worker, train

MIB = 2**20
ALLOWED = 192 * MIB  # of each worker beside its budget: batches on their way, kept buffers, metrics, the allocator's remainder
FEATURES, DENSE = 8, 4
POPULAR = 2_000_000  # ids that can be drawn at one moment
NEW_IDS = 500  # by so many the window moves on at each step


def config_of(batch_size: int, workers: int) -> Config:
    return Config(
        data=DataConfig(
            train=("synthetic",), dense=tuple(f"d{at}" for at in range(DENSE)), categorical=tuple(f"c{at}" for at in range(FEATURES))
        ),
        policy=PolicyConfig(interval=50, decay=0.999),
        model=ModelConfig(bottom=(64, 32), top=(64,)),
        train=TrainConfig(workers=workers, batch_size=batch_size),
        tracking=TrackingConfig(log_every=50),
    )


def batches(rank: int, rows: int, until: float, steps: int | None) -> Iterator[Batch]:
    """This worker's batches until a moment (time.time), or for so many steps."""
    generator = np.random.default_rng(rank)
    step = 0
    # all workers must take as many steps: with a moment, rank 0 says for all when it has come
    while steps is None or step < steps:
        going = torch.tensor([float(time.time() < until)])
        dist.broadcast(going, 0)
        if not going:
            return
        ranks = np.minimum(generator.pareto(0.6, (FEATURES, rows)), POPULAR).astype(np.int64)
        ids = ranks + step * NEW_IDS
        labels = (generator.random(rows) < 0.3 + 0.4 * ((ids[0] * 2654435761 >> 7) % 2)).astype(np.float32)
        dense = generator.standard_normal((rows, DENSE)).astype(np.float32)
        yield Batch(torch.from_numpy(dense), torch.from_numpy(labels), torch.from_numpy(ids.reshape(-1)), torch.arange(FEATURES * rows + 1))
        step += 1


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=arguments.workers)
    config = config_of(arguments.batch, arguments.workers)
    worker = Worker(config, arguments.budget, make_exchange(), LocalDecider(config.policy))
    notes = Path(folder) / f"{rank}.json"
    started = {"rss": resident(None), "pid": 0}

    def beat() -> None:
        stats = worker.shard.stats()
        note = started | {"step": worker.step, "store": stats.total, "rows": stats.rows, "distinct": stats.distinct}
        partial = notes.with_suffix(".part")
        partial.write_text(json.dumps(note))
        partial.rename(notes)

    worker.beat = beat
    train(worker, lambda: batches(rank, arguments.batch // arguments.workers, arguments.until, arguments.steps))
    dist.destroy_process_group()


def resident(pid: int | None) -> int:
    """Bytes of a process in memory, from /proc."""
    text = Path(f"/proc/{'self' if pid is None else pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def watch(context: Any, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Samples of all workers until they end."""
    samples: list[dict[str, Any]] = []
    start, pids = time.monotonic(), context.pids()
    while not context.join(timeout=seconds):
        for rank, pid in enumerate(pids):
            path = folder / f"{rank}.json"
            if path.exists():
                try:
                    samples.append(json.loads(path.read_text()) | {"rank": rank, "s": time.monotonic() - start, "now": resident(pid)})
                except (FileNotFoundError, StopIteration):  # it has just ended
                    continue
    return samples


def judge(samples: list[dict[str, Any]], rank: int, budget: int) -> dict[str, Any]:
    mine = [each for each in samples if each["rank"] == rank]
    late = mine[len(mine) // 2 :]
    hours = np.array([each["s"] for each in late]) / 3600
    slope = float(np.polyfit(hours, [each["now"] for each in late], 1)[0]) if len(late) > 2 else float("nan")
    most, bound = max(each["now"] for each in mine), mine[0]["rss"] + budget + ALLOWED
    last = mine[-1]
    return {
        "rank": rank,
        "steps": last["step"],
        "samples": len(mine),
        "before_mib": mine[0]["rss"] / MIB,
        "most_mib": most / MIB,
        "end_mib": last["now"] / MIB,
        "bound_mib": bound / MIB,
        "store_mib": last["store"] / MIB,
        "slope_mib_per_hour": slope / MIB,
        "distinct_ids": last["distinct"],
        "rows": last["rows"],
        "below_bound": bool(most <= bound),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="end after so many steps, if the minutes are not over before")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget", type=int, default=64 * MIB, help="bytes of all shards together")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a global batch")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.until = time.time() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(work, (arguments, folder), nprocs=arguments.workers, join=False)
        samples = watch(context, Path(folder), arguments.every)
    results = [judge(samples, rank, arguments.budget) for rank in range(arguments.workers)]
    print(f"{'worker':>6} {'steps':>8} {'ids met':>10} {'MiB before':>10} {'most':>8} {'end':>8} {'bound':>8} {'store':>7} {'MiB/hour':>9}")
    for each in results:
        print(
            f"{each['rank']:>6} {each['steps']:>8,} {each['distinct_ids']:>10,} {each['before_mib']:>10.1f} {each['most_mib']:>8.1f} "
            f"{each['end_mib']:>8.1f} {each['bound_mib']:>8.1f} {each['store_mib']:>7.1f} {each['slope_mib_per_hour']:>9.2f}"
        )
    if arguments.json:
        described = {"budget": arguments.budget, "batch": arguments.batch, "allowed": ALLOWED, "workers": results, "samples": samples}
        arguments.json.write_text(json.dumps(described, indent=1))
    return 0 if all(each["below_bound"] for each in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
