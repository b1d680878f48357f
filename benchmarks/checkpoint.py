"""How long a checkpoint stops training, what it writes, and what loading one takes.

    python benchmarks/checkpoint.py --json FILE [--rows 1000000] [--steps 20] [--folder FOLDER]

Synthetic: a DLRM with 8 tables of D = 32, row-wise Adagrad, single-hot power-law ids, batches of 4096, one process. The store is filled
with full-width rows, then trained on; after `--steps` steps each, it is saved whole and as an increment (rows changed since). `stopped` is
the time from the call to the return of `Saver.save`; `written` is when the files are complete, while training goes on; `during` is the
median step while they were being written, beside `step` without. Each is taken twice: the first finds no memory that this process has
used before. `bound` is what copying the bytes once would take at the copy bandwidth measured here, between tensors that are there already;
`copy` is a plain copy of as many bytes into fresh memory: handing out pages takes the system longer than filling them. Loading is done in a
process of its own, which has loaded a small one before, so that libraries are there; its memory is the growth to the resident peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fiited_ray.allocator import keep_freed_memory
from fiited_ray.checkpoint import Folder, FolderPublisher, Saver, open_checkpoint
from fiited_ray.checkpoint.load import load_shard
from fiited_ray.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.exchange import Solo
from fiited_ray.store import ShardSpec, VhpiShard, ops
from fiited_ray.train.loop import Worker, train_step

TABLES, BATCH, SKEW = 8, 4096, 1.05
KINDS = ("whole", "increment", "whole again", "increment again")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20, help="training steps before each checkpoint")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; the system's temporary folder if left out")
    arguments = parser.parse_args()
    keep_freed_memory()
    results: dict[str, Any] = {"rows": arguments.rows, "steps": arguments.steps, "copy_gb_per_s": copy_bandwidth() / 1e9}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results["cases"] = [
            measure(arguments.rows, arguments.steps, staging, Path(name) / str(staging), results["copy_gb_per_s"])
            for staging in (32 * MIB, 4096 * MIB)
        ]
        small = make_worker(32 * MIB)
        fill(small, 10_000)
        saver = Saver(small, FolderPublisher(Folder.of(Path(name) / "small")), "benchmark")
        saver.save()
        saver.wait()
        folders = [next((Path(name) / each).glob("checkpoint_000000")) for each in ("small", str(32 * MIB))]
        results["load"] = load_in_another_process(folders)
    arguments.json.write_text(json.dumps(results, indent=1))
    show(results)


def copy_bandwidth() -> float:
    """Bytes a second, read and written counted once each."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(times)


def copy_seconds(size: int) -> float:
    """A copy of so many bytes into memory that is taken for it."""
    source, times = torch.ones(size, dtype=torch.uint8), []
    for _ in range(5):
        fresh = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        start = time.perf_counter()
        fresh.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_worker(staging_bytes: int) -> Worker:
    config = dataclasses.replace(
        Config(data=DataConfig(dense=("d",), categorical=tuple(f"c{table}" for table in range(TABLES)))),
        model=ModelConfig(bottom=(64,), top=(64,)),
        train=TrainConfig(workers=1, batch_size=BATCH),
        checkpoint=CheckpointConfig(incremental=1, staging_bytes=staging_bytes),
    )
    return Worker(config, None, Solo(), LocalDecider(config.policy))


def measure(rows: int, steps: int, staging_bytes: int, folder: Path, copy_gb_per_s: float) -> dict[str, Any]:
    """A whole checkpoint and an increment, with staging memory of this size."""
    worker = make_worker(staging_bytes)
    fill(worker, rows)
    batches = [draw(number, rows) for number in range(8)]
    step_seconds = [timed_step(worker, batches[number % 8]) for number in range(steps)]
    saver = Saver(worker, FolderPublisher(Folder.of(folder)), "benchmark")
    out: dict[str, Any] = {"staging_mib": staging_bytes / MIB, "step_s": statistics.median(step_seconds[2:])}
    for kind in KINDS:
        start = time.perf_counter()
        told = saver.save()
        during = []
        while not saver.written:
            during.append(timed_step(worker, batches[len(during) % 8]))
        written = time.perf_counter() - start
        size = sum(file.stat().st_size for file in sorted(folder.iterdir())[-1].iterdir())
        out[kind] = {
            "rows": int(told["checkpoint/rows"]),
            "mib": size / MIB,
            "stopped_s": told["checkpoint/stopped_s"],
            "bound_s": 2 * size / (copy_gb_per_s * 1e9),
            "copy_s": copy_seconds(size),
            "written_s": written,
            "step_during_s": statistics.median(during) if during else None,
        }
        for number in range(steps):
            timed_step(worker, batches[number % 8])
    return out


def fill(worker: Worker, rows: int) -> None:
    """Give ids 0 .. rows - 1, dealt evenly to the tables, a row of full width each."""
    tables, part = torch.arange(TABLES, dtype=torch.int32), 1 << 17
    for first in range(0, rows, part):
        ids = torch.arange(first, min(rows, first + part)) // TABLES
        ids = ids[: len(ids) // TABLES * TABLES]
        ends = torch.arange(1, TABLES + 1) * (len(ids) // TABLES)
        local = ops.dedup_ids(ids.reshape(-1, TABLES).t().reshape(-1).contiguous(), ends, tables, worker.config.seed, 1)
        worker.shard.lookup(local.keys, local.tables, local.counts, training=True)


def draw(seed: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(TABLES * BATCH, generator=generator, dtype=torch.float64)
    most = rows // TABLES
    ids = ((1 - uniform * (1 - most ** (1 - SKEW))) ** (1 / (1 - SKEW))).long().clamp(max=most) - 1
    labels = (torch.rand(BATCH, generator=generator) < 0.3).float()
    return Batch(torch.rand(BATCH, 1, generator=generator), labels, ids, torch.arange(TABLES * BATCH + 1))


def timed_step(worker: Worker, batch: Batch) -> float:
    start = time.perf_counter()
    train_step(worker, batch)
    return time.perf_counter() - start


def load_in_another_process(folders: list[Path]) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=load, args=(folders, queue))
    process.start()
    found: dict[str, float] = queue.get()
    process.join()
    return found


def load(folders: list[Path], queue: Any) -> None:
    for folder in folders:
        saved = open_checkpoint(Folder.of(folder))
        shard = VhpiShard(ShardSpec.of(saved.config(), None))
        before, start = memory("VmRSS"), time.perf_counter()
        load_shard(saved, shard)
        seconds = time.perf_counter() - start
    files = [file.bytes for part in saved.parts for file in part.files]
    queue.put(
        {
            "seconds": seconds,
            "files_mib": sum(files) / MIB,
            "largest_file_mib": max(files) / MIB,
            "shard_mib": shard.stats().total / MIB,
            "grown_mib": (memory("VmHWM") - before) / MIB,
        }
    )


def memory(what: str) -> int:
    """Bytes that are resident (VmRSS), or were at most (VmHWM); Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def show(results: dict[str, Any]) -> None:
    print(f"{results['rows']:,} rows, copy bandwidth {results['copy_gb_per_s']:.1f} GB/s, synthetic ids")
    print("| staging MiB | checkpoint | rows | MiB | stopped s | copy s | bound s | written s | step ms | step ms, while writing |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in results["cases"]:
        for kind in KINDS:
            at = case[kind]
            during = "-" if at["step_during_s"] is None else f"{1e3 * at['step_during_s']:.1f}"
            print(
                f"| {case['staging_mib']:.0f} | {kind} | {at['rows']:,} | {at['mib']:.1f} | {at['stopped_s']:.3f} | {at['copy_s']:.3f} | "
                f"{at['bound_s']:.3f} | {at['written_s']:.2f} | {1e3 * case['step_s']:.1f} | {during} |"
            )
    loaded = results["load"]
    print(
        f"loading {loaded['files_mib']:.1f} MiB took {loaded['seconds']:.2f} s and {loaded['grown_mib']:.1f} MiB of memory: the shard has "
        f"{loaded['shard_mib']:.1f} MiB, the largest file {loaded['largest_file_mib']:.1f}"
    )


if __name__ == "__main__":
    main()
