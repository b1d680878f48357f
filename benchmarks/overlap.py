"""What routing the next batch ahead of its step (`train.overlap`) is worth: samples/s with it and without, by turns in the same processes.

    python benchmarks/overlap.py --config jobs/configs/synthetic.yaml --json FILE [key=value ...]

Workers are plain processes on gloo that read Parquet directly; the batch and the budget are those of the configuration whatever their
number. Times a step are the first worker's; `ahead` is what its thread did beside the step, and the CPU time of the loop's own thread is
what a step cannot be shorter than, however busy the machine is. Losses must be the same in every run of a setup, bit for bit: that is
checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fiited_ray.config import load
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import parquet_batches
from fiited_ray.exchange import make_exchange
from fiited_ray.train.loop import Worker, train
from fiited_ray.train.plan import Plan, make_plan


def measure(rank: int, plan: Plan, workers: int, threads: int, turns: int, folder: str) -> None:
    """One worker: trains with and without overlap by turns, and leaves what it measured in the folder."""
    torch.set_num_threads(threads)
    if workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=workers)
    runs: list[dict[str, Any]] = []
    for turn in range(turns + 1):  # the first one warms up
        for overlap in (0, 1) if turn % 2 else (1, 0):
            config = dataclasses.replace(plan.config, train=dataclasses.replace(plan.config.train, workers=workers, overlap=overlap))
            worker = Worker(config, plan.budget_bytes, make_exchange(), LocalDecider(config.policy))
            size = config.train.batch_size
            before = time.thread_time()
            metrics = train(worker, lambda: parquet_batches(plan.files, config.data, size, rank=rank, workers=workers))  # noqa: B023
            loop_cpu = (time.thread_time() - before) / worker.step
            seconds = {name: sum(series) / len(series) for name, series in worker.history.values.items() if name[:5] in ("time/", "ahead")}
            speed = metrics["speed/samples_per_s_of_run"]
            if turn:
                runs.append({"overlap": overlap, "samples_per_s": speed, "seconds": seconds, "loop_cpu": loop_cpu, "losses": worker.losses})
    (Path(folder) / f"{rank}.json").write_text(json.dumps(runs))


def compare(plan: Plan, workers: int, threads: int, turns: int) -> dict[str, Any]:
    """Medians with and without overlap for one setup."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (plan, workers, threads, turns, folder), nprocs=workers)
        runs = json.loads((Path(folder) / "0.json").read_text())
    row: dict[str, Any] = {"workers": workers, "threads": threads, "same_losses": all(run["losses"] == runs[0]["losses"] for run in runs)}
    for overlap in (0, 1):
        mine = [run for run in runs if run["overlap"] == overlap]
        speeds = [run["samples_per_s"] for run in mine]
        phases = {phase: median(run["seconds"][phase] for run in mine) for phase in mine[0]["seconds"]}
        row[f"overlap_{overlap}"] = {
            "samples_per_s": median(speeds),
            "least": min(speeds),
            "most": max(speeds),
            "loop_cpu_seconds": median(run["loop_cpu"] for run in mine),
            "seconds": phases,
        }
    row["speedup"] = row["overlap_1"]["samples_per_s"] / row["overlap_0"]["samples_per_s"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--setups", nargs="+", default=["1x1", "1x2", "2x1"], help="workers x threads")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    plan = make_plan(load(arguments.config, arguments.overrides))
    print(plan.describe())
    print(f"{'workers x threads':<19}{'overlap':>8}{'samples/s':>11}{'least - most':>18}{'CPU ms of loop':>16}  ms a step by phase")
    rows = []
    for setup in arguments.setups:
        workers, threads = map(int, setup.split("x"))
        rows.append(row := compare(plan, workers, threads, arguments.turns))
        for overlap in (0, 1):
            cell = row[f"overlap_{overlap}"]
            spread = f"{cell['least']:,.0f} - {cell['most']:,.0f}"
            phases = ", ".join(f"{name.removeprefix('time/')} {1000 * seconds:.1f}" for name, seconds in cell["seconds"].items())
            print(f"{setup:<19}{overlap:>8}{cell['samples_per_s']:>11,.0f}{spread:>18}{1000 * cell['loop_cpu_seconds']:>16.1f}  {phases}")
        print(f"{'':<19}speedup {row['speedup']:.3f}; losses {'the same' if row['same_losses'] else 'DIFFER'}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"config": plan.config.to_dict(), "budget_bytes": plan.budget_bytes, "setups": rows}, indent=1)
        )
    return 0 if all(row["same_losses"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
