"""How training scales from 1 to 8 workers, how the wire follows the budget, and what 1000 shards cost the coordinator.

    python benchmarks/scaling.py --json docs/scaling.json [--parts train wire coordinator constants] [--plots docs/plots]

Synthetic data. Real Ray on one machine: up to four raylets ("nodes", by Ray's cluster utilities), the workers spread evenly over them,
sockets between the workers, the real coordinator actor. More workers than cores take turns, so the wall time of a step cannot fall here:
CPU seconds a sample, of all workers together, say what distribution costs. Batches are collated beforehand; reading is measured by
itself. Parts write their key of the JSON and leave the others as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import scaling_constants
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from torch import Tensor

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, PolicyConfig, TrainConfig
from fiited_ray.coordinator import Decider, RemoteDecider, start_coordinator
from fiited_ray.data import Batch, check_files, count_distinct, parquet_batches
from fiited_ray.data.synthetic import CATEGORICAL, DENSE, SyntheticSpec, write_synthetic
from fiited_ray.exchange import Group, Solo, make_exchange
from fiited_ray.policy import BINS, RoundState, ShardReport, decide, levels_of
from fiited_ray.store.layout import dense_row_bytes
from fiited_ray.train.loop import Worker, train_step
from fiited_ray.train.rounds import hold_round

GLOBAL, PER_WORKER, TINY = 4096, 512, 8  # rows of a step: strong scaling, weak scaling, and next to none
WARM, STEPS = 30, 20
INTERVAL = 20  # steps between rounds
SPEC = SyntheticSpec(rows=(WARM + STEPS) * GLOBAL, test_share=0.0)
WORKERS = (1, 2, 4, 8)
MOST_NODES = 4  # raylets; eight workers share four
BUDGETS = (None, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)
SHARDS = (1, 10, 100, 1000)
ROUNDS = 15  # of the coordinator
SMALL, LARGE = 16, 1 << 20  # bytes to each peer, to tell a message's cost from a byte's


@dataclasses.dataclass(frozen=True)
class Case:
    """One run to be measured."""

    kind: str  # strong, weak, tiny or wire
    workers: int
    batch: int  # rows of all workers
    share: float | None  # of the dense-equivalent bytes


def configuration(path: str, case: Case) -> Config:
    data = DataConfig(
        train=(path,),
        dense=tuple(f"d{at}" for at in range(DENSE)),
        dense_transform="log1p",
        categorical=tuple(f"c{at}" for at in range(CATEGORICAL - 1)),
        multi_hot=(f"c{CATEGORICAL - 1}",),
    )
    train = TrainConfig(workers=case.workers, batch_size=case.batch)
    return Config(data, policy=PolicyConfig(first_round=5, interval=INTERVAL), embedding=EmbeddingConfig(init_scale=0.001), train=train)


class Watched(Group):
    """A group that adds up the widths it carries: the only bytes that there are beside other rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.widths = torch.zeros(2, dtype=torch.float64)  # sum, count

    def all_to_all_with(
        self, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        if rows.dtype == torch.uint8:
            self.widths += torch.tensor([float(rows.sum()), float(rows.numel())])
        return super().all_to_all_with(rows, send, receive, more, send_more)


def measure(case: Case, path: str, ids: int, rank: int, decider: Decider) -> dict[str, Any]:
    """Train, and measure the steps after the warm-up; the same on every worker."""
    config = configuration(path, case)
    budget = None if case.share is None else int(case.share * ids * dense_row_bytes(config.embedding))
    exchange = Watched(dist.new_group()) if case.workers > 1 else Solo()
    worker = Worker(config, budget, exchange, decider)
    files = check_files(config.data.train, config.data)
    rows = (WARM + STEPS) * case.batch
    batches = list(parquet_batches(files, config.data, case.batch, rank=rank, workers=case.workers, max_rows=rows, prefetch=False))
    for batch in batches[:WARM]:
        _step(worker, batch)
    worker.times.seconds.clear()
    if isinstance(exchange, Watched):
        exchange.widths.zero_()
        dist.barrier()
    sent, wall, cpu = exchange.bytes_sent, time.perf_counter(), time.process_time()
    for batch in batches[WARM:]:
        _step(worker, batch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    phases = ("route", "gather", "model", "update", "round")
    sums = exchange.all_reduce(
        torch.tensor([cpu, wall, exchange.bytes_sent - sent, *(worker.times.seconds.get(each, 0.0) for each in phases)]).double()
    ).tolist()
    result: dict[str, Any] = dataclasses.asdict(case)
    result |= {
        "step_ms": 1e3 * sums[1] / case.workers / STEPS,
        "cpu_us_per_sample": 1e6 * sums[0] / STEPS / case.batch,
        "samples_per_s": STEPS * case.batch / (sums[1] / case.workers),
        "wire_bytes_per_sample": sums[2] / STEPS / case.batch,
        "phase_ms": {name: 1e3 * total / case.workers / STEPS for name, total in zip(phases, sums[3:], strict=True)},
    }
    if isinstance(exchange, Watched):
        total, count = exchange.all_reduce(exchange.widths).tolist()
        result |= {"live_width": total / count, "keys_per_sample": count / STEPS / case.batch}
    return result


def _step(worker: Worker, batch: Batch) -> None:
    train_step(worker, batch)
    if worker.schedule.due(worker.step, worker.embedding.crowded):
        with worker.times.phase("round"):
            hold_round(worker)


def measure_exchange() -> dict[str, float]:
    """CPU seconds of one all-to-all, of each worker: with next to nothing in it, and with 1 MiB for each peer."""
    exchange = make_exchange()
    ones = [1] * exchange.workers
    seconds = []
    for size, times in ((SMALL, 200), (LARGE, 8)):
        rows = torch.zeros(exchange.workers, size, dtype=torch.uint8)
        exchange.all_to_all(rows, ones, ones)
        dist.barrier()
        start = time.process_time()
        for _ in range(times):
            exchange.all_to_all(rows, ones, ones)
        seconds.append((time.process_time() - start) / times)
    small, large = (exchange.all_reduce(torch.tensor(seconds).double()) / exchange.workers).tolist()
    peers = exchange.workers - 1
    return {"workers": exchange.workers, "small_s": small, "byte_s": (large - small) / (peers * (LARGE - SMALL))}


@ray.remote(num_cpus=1)
def _work(rank: int, workers: int, cases: list[tuple[Case, Any]], path: str, ids: int, meeting: str) -> dict[str, Any]:
    """One worker: its part of every case. Nodes have no more CPUs than workers are wanted on them, so all nodes get theirs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    runs = [measure(case, path, ids, rank, RemoteDecider(actor)) for case, actor in cases]
    exchange = measure_exchange() if workers > 1 else None
    dist.destroy_process_group()
    return {"runs": runs, "exchange": exchange, "node": ray.get_runtime_context().get_node_id()}


@contextmanager
def nodes(count: int, cpus: int) -> Iterator[None]:
    """A Ray of several raylets on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=cpus)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def run_on_nodes(cases: list[Case], path: str, ids: int, folder: str) -> dict[str, Any]:
    """Measure cases of equally many workers, a CPU for each; what the first one says."""
    workers, meeting = cases[0].workers, f"{folder}/{cases[0].kind}-{cases[0].workers}"
    count = min(workers, MOST_NODES)
    with nodes(count, workers // count):
        given = [(case, start_coordinator(PolicyConfig())) for case in cases]
        results = ray.get([_work.remote(rank, workers, given, path, ids, meeting) for rank in range(workers)])
    assert len({each["node"] for each in results}) == count
    return results[0]


def part_train(path: str, ids: int, folder: str, counts: list[int], before: dict[str, Any]) -> dict[str, Any]:
    """Weak and strong scaling for these numbers of workers; what was measured before for others stays."""
    runs = [run for run in before.get("runs", []) if run["workers"] not in counts]
    exchanges = [each for each in before.get("exchange", []) if each["workers"] not in counts]
    for workers in counts:
        cases = [Case(kind, workers, rows * workers, 1 / 16) for kind, rows in (("tiny", TINY), ("weak", PER_WORKER))]
        cases.append(Case("strong", workers, GLOBAL, 1 / 16))
        result = run_on_nodes(cases, path, ids, folder)
        runs += result["runs"]
        exchanges += [result["exchange"]] if result["exchange"] else []
        print_runs(result["runs"])
    runs.sort(key=lambda run: (run["kind"], run["workers"]))
    vocabulary = sum(map(SPEC.cardinality, range(CATEGORICAL)))  # that ids are drawn from; `ids` were drawn
    about = {"most_nodes": MOST_NODES, "cores": os.cpu_count(), "ids": ids, "vocabulary": vocabulary, "interval": INTERVAL}
    return about | {"runs": runs, "exchange": exchanges}


def part_wire(path: str, ids: int, folder: str) -> dict[str, Any]:
    result = run_on_nodes([Case("wire", 2, GLOBAL, share) for share in BUDGETS], path, ids, folder)
    print_runs(result["runs"])
    return {"ids": ids, "runs": result["runs"]}


def print_runs(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        phases = " ".join(f"{name} {ms:.1f}" for name, ms in run["phase_ms"].items())
        share = "full" if run["share"] is None else f"{run['share']:.4f}"
        print(
            f"{run['kind']:<7}{run['workers']:>2} workers, batch {run['batch']:>5}, budget {share:>6}: step {run['step_ms']:>6.1f} ms, "
            f"CPU {run['cpu_us_per_sample']:>6.1f} us/sample, wire {run['wire_bytes_per_sample']:>6.0f} B/sample, "
            f"live width {run.get('live_width', float('nan')):.2f}; ms: {phases}",
            flush=True,
        )


def simulated_report(seed: int, ceiling_bytes: int | None) -> ShardReport:
    """A shard with 100,000 rows, importance spread over many octaves."""
    importance = np.random.default_rng(seed).normal(1000, 150, 100_000).astype(int).clip(0, BINS - 1)
    rows = np.bincount(importance, minlength=BINS)
    return ShardReport(np.stack([rows, rows * 90]), 1_000_000, ceiling_bytes=ceiling_bytes)


def part_coordinator() -> dict[str, Any]:
    """Seconds from the first worker's call to its answer, and what the actor's process works for it."""
    results = []
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    actor = start_coordinator(PolicyConfig())
    for shards in SHARDS:
        kinds = [simulated_report(seed, None) for seed in range(8)]
        histogram = sum(kinds[shard % 8].histogram for shard in range(shards))
        together = [ShardReport(histogram, shards * 1_000_000, shards=shards)]
        one_by_one = [simulated_report(shard % 8, 20_000_000) for shard in range(shards)]
        result: dict[str, Any] = {"shards": shards}
        for kind, reports in (("sum", together), ("each", one_by_one)):
            wall, cpu = _rounds(actor, reports, _state(shards))
            alone = _decide_seconds(reports, _state(shards))
            result |= {f"{kind}_round_s": wall, f"{kind}_actor_cpu_s": cpu, f"{kind}_decide_cpu_s": alone}
        results.append(result)
        print("  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
    ray.shutdown()
    return {"rounds": results}


def _state(shards: int) -> RoundState:
    return RoundState(shards * 10_000_000, 1e-3, levels_of(2.0, 4), (0, 58, 90, 122, 154))


def _decide_seconds(reports: list[ShardReport], state: RoundState) -> float:
    """CPU seconds of the pure decision, no actor around it."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        decide(reports, state, PolicyConfig())
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _rounds(actor: Any, reports: list[ShardReport], state: RoundState) -> tuple[float, float]:
    """Median seconds of a round, and of the actor's process in it."""
    decider = RemoteDecider(actor)
    walls, cpus = [], []
    for step in range(ROUNDS + 1):  # the first one connects
        cpu, start = ray.get(actor.__ray_call__.remote(_process_time)), time.perf_counter()
        assert decider.decide(step, reports, state) is not None
        walls.append(time.perf_counter() - start)
        cpus.append(ray.get(actor.__ray_call__.remote(_process_time)) - cpu)
    return statistics.median(walls[1:]), statistics.median(cpus[1:])


def _process_time(actor: Any) -> float:
    return time.process_time()


def main() -> int:
    parts = ("train", "wire", "coordinator", "constants")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS), help="of the part train")
    parser.add_argument("--plots", type=Path, help="folder for the curve of wire bytes over live width")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if {"train", "wire", "constants"} & set(arguments.parts):
            path, *_ = write_synthetic(Path(folder), SPEC)
            config = configuration(str(path), Case("strong", 1, GLOBAL, None))
            ids = sum(count_distinct(check_files(config.data.train, config.data), config.data))
        for part in arguments.parts:
            if part == "train":
                results["train"] = part_train(str(path), ids, folder, arguments.workers, results.get("train", {}))
            elif part == "wire":
                results["wire"] = part_wire(str(path), ids, folder)
            elif part == "coordinator":
                results["coordinator"] = part_coordinator()
            else:
                results["costs"] = scaling_constants.measure(config)
            arguments.json.write_text(json.dumps(scaling_constants.with_constants(results), indent=1) + "\n")
    if arguments.plots and "wire" in results:
        scaling_constants.plot_wire(results["wire"]["runs"], arguments.plots / "wire_bytes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
