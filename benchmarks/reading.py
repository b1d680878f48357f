"""What reading costs: Parquet to batches directly with Arrow, and through Ray Data, in CPU seconds and in time.

    python benchmarks/reading.py --json FILE [--config FILE.yaml] [--step-ms MS] [key=value ...]

For each reader and 1 and 2 workers: every worker (a process) reads and collates its slice of all global batches; nothing is trained.
CPU seconds are those of all processes that take part, Ray's included, from /proc; time is the slowest worker's. The second epoch is
measured, from its opening to its end: Ray's reading processes are there by then, and what they read ahead is counted. `--step-ms` is
the CPU time of a training step of one worker with one thread (by benchmarks/end_to_end.py: `cpu_us_per_sample` of ours_full_1x1, times
the batch size, reading included), of which the shares are taken. Without --config the data are synthetic, made into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from settings import config_of

from fiited_ray.config import Config
from fiited_ray.data import check_files, parquet_batches, ray_batches, ray_dataset
from fiited_ray.data.files import Files
from fiited_ray.data.synthetic import SyntheticSpec

TICKS = os.sysconf("SC_CLK_TCK")


@ray.remote(num_cpus=0)
class Reader:
    """A worker that only reads."""

    def __init__(self, config: Config, files: Files, reader: str, rank: int, workers: int) -> None:
        torch.set_num_threads(1)
        self.config, self.files, self.rank, self.workers = config, files, rank, workers
        self.dataset = ray_dataset(files, config.data, config.data.max_rows) if reader == "ray" else None
        if self.dataset is not None:
            self.dataset.context.execution_options.preserve_order = True

    def read(self) -> tuple[float, int]:
        """Seconds and rows of one epoch."""
        data, size = self.config.data, self.config.train.batch_size
        start = time.perf_counter()
        if self.dataset is None:
            batches = parquet_batches(self.files, data, size, rank=self.rank, workers=self.workers, max_rows=data.max_rows)
        else:
            total = self.files.first_rows(data.max_rows)
            batches = ray_batches(self.dataset.iterator(), data, size, self.rank, self.workers, total=total)
        rows = sum(batch.rows for batch in batches)
        return time.perf_counter() - start, rows


def cpu_seconds() -> float:
    """Of this process, of all Ray processes it started, and of their children that have ended."""
    own, total = os.getpid(), 0
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    for process in ticks:
        ancestor = process
        while ancestor not in (own, 0, 1):
            ancestor = parents.get(ancestor, 0)
        total += ticks[process] if ancestor == own else 0
    return total / TICKS


def measure(config: Config, reader: str, workers: int) -> dict[str, Any]:
    files = check_files(config.data.train, config.data)
    readers = [Reader.remote(config, files, reader, rank, workers) for rank in range(workers)]  # type: ignore[attr-defined]
    ray.get([each.read.remote() for each in readers])
    cpu = cpu_seconds()
    parts = ray.get([each.read.remote() for each in readers])
    cpu = cpu_seconds() - cpu
    for each in readers:
        ray.kill(each)
    seconds, rows = max(part[0] for part in parts), sum(part[1] for part in parts)
    return {
        "reader": reader,
        "workers": workers,
        "rows": rows,
        "cpu_us_per_sample": 1e6 * cpu / rows,
        "us_per_sample": 1e6 * seconds / rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's configuration; synthetic data if left out")
    parser.add_argument("--rows", type=int, default=SyntheticSpec.rows, help="of the synthetic data")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--step-ms", type=float, help="CPU milliseconds of a training step")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    cpus = max(os.cpu_count() or 1, max(arguments.workers) + 2)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments.config, arguments.rows, folder, ["train.workers=1", *arguments.overrides])
        found = [measure(config, reader, workers) for workers in arguments.workers for reader in ("arrow", "ray")]
    ray.shutdown()
    print(f"{'reader':<8}{'workers':>8}{'rows':>12}{'CPU us/sample':>15}{'us/sample':>11}{'of a step':>11}")
    for each in found:
        if arguments.step_ms:
            each["share_of_step"] = each["cpu_us_per_sample"] * config.train.batch_size / 1e3 / arguments.step_ms
        share = f"{each['share_of_step']:.1%}" if arguments.step_ms else "-"
        print(
            f"{each['reader']:<8}{each['workers']:>8}{each['rows']:>12,}{each['cpu_us_per_sample']:>15.2f}{each['us_per_sample']:>11.2f}{share:>11}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"readers": found, "batch_size": config.train.batch_size}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
