"""What profile.py does."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from settings import config_of
from torch.profiler import ProfilerActivity

from fiited_ray.config import Config
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, parquet_batches
from fiited_ray.exchange import Solo
from fiited_ray.train.loop import Worker, train
from fiited_ray.train.plan import make_plan


def trace(config: Config, path: Path, warmup: int, steps: int) -> str:
    """Train, write the trace of the last `steps` steps in Chrome's format, and return a table of the operators."""
    plan = make_plan(config)
    worker = Worker(config, plan.budget_bytes, Solo(), LocalDecider(config.policy))
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])

    def batches() -> Iterator[Batch]:
        read = parquet_batches(plan.files, config.data, config.train.batch_size, max_rows=config.data.max_rows)
        yield from itertools.islice(read, warmup)
        with profiler:
            yield from itertools.islice(read, steps)

    train(worker, batches)
    if worker.step < warmup + steps:
        raise SystemExit(f"the data have {worker.step} batches; {warmup} + {steps} are wanted: lower --warmup, or train.batch_size")
    profiler.export_chrome_trace(str(path))
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)


def main(description: str | None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="the file to write")
    parser.add_argument("--config", help="a run's configuration; synthetic data if left out")
    parser.add_argument("--rows", type=int, default=400_000, help="of the synthetic data")
    parser.add_argument("--warmup", type=int, default=50, help="steps before the trace begins")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments.config, arguments.rows, folder, ["train.workers=1", *arguments.overrides])
        torch.set_num_threads(config.train.threads)
        print(trace(config, arguments.trace, arguments.warmup, arguments.steps))
    print(f"{arguments.trace}: open it at https://ui.perfetto.dev")
    return 0
