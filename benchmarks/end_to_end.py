"""Training speed end to end: ours beside the same DLRM on torch's sparse tables and on TorchRec's, on two cores.

    python benchmarks/end_to_end.py --json FILE [--config FILE.yaml] [key=value ...]

Without --config the data are synthetic, in Criteo's shape, made into a temporary folder. All systems read the same Parquet files with the
same reader (its thread included), batch size, towers, dense optimizer and D. Single-process ones have two threads; ours is measured as
one process with two threads and as two processes with one, and the faster of these is its headline (`ours_full`); `apart` are two that
tell each other nothing, which is what two workers could reach at most. Each system has processes of its own. They take turns, one runs
at a time, and figures are medians over turns. All of them measure on the same batches: ours has trained on all before, the peers, whose
speed does not depend on what was learned, on the last few of these.

`full`: a row for every id (peers: as many rows as distinct ids). `1/16`: ours within a sixteenth of the dense-equivalent bytes,
everything counted; peers with a sixteenth of the rows, ids modulo that. Row-wise Adagrad, but elementwise for torch, which has no other
sparse one. Ours checks every batch, keeps its metrics, reports every `tracking.log_every` steps and holds its rounds; peers only train.
Peers are optional: without them their columns are empty.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist
from settings import config_of

from fiited_ray.ahead import ahead
from fiited_ray.allocator import keep_freed_memory
from fiited_ray.config import Config
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, count_distinct, parquet_batches
from fiited_ray.data.synthetic import SyntheticSpec
from fiited_ray.exchange import make_exchange
from fiited_ray.store.layout import dense_row_bytes
from fiited_ray.train.loop import Worker, train

SHARE = 1 / 16
PEER_WARMUP = 10  # batches; tables and buffers have been touched by then
PHASES = ("data", "route", "gather", "model", "update", "round")


@dataclass(frozen=True)
class System:
    """One contestant at one size."""

    kind: str  # ours, torch, torchrec
    share: float
    workers: int = 1
    threads: int = 2
    apart: bool = False  # workers that tell each other nothing: each with a store of its own and its part of the batch
    borrow_dense: bool = False  # a peer with our dense part

    @property
    def name(self) -> str:
        if self.kind == "ours":
            shape = f"_{self.workers}x{self.threads}{'_apart' if self.apart else ''}"
        else:
            shape = "_our_dense" if self.borrow_dense else ""
        return f"{self.kind}_{label(self.share)}{shape}"


@dataclass(frozen=True)
class Task:
    """What a system's process needs to know."""

    system: System
    config: Config
    distinct: list[int]  # ids of each table
    warmup: int
    settle: int
    steps: int
    folder: str  # where workers meet


class Turns:
    """Hands out batches as the parent asks for turns, and times them: the consumer never knows."""

    def __init__(self, task: Task, batches: Iterator[Batch], pipe: Connection) -> None:
        self.task, self.batches, self.pipe = task, batches, pipe
        self.mark: Callable[[], Any] = lambda: None  # called at the begin and end of a turn
        self.tell: Callable[[Any, Any], dict[str, float]] = lambda begin, end: {}

    def __iter__(self) -> Iterator[Batch]:
        yield from self._next(self.task.warmup)
        self.pipe.send({})
        while self.pipe.recv():
            yield from self._next(self.task.settle)
            begin, clock, cpu = self.mark(), time.perf_counter(), time.process_time()
            yield from self._next(self.task.steps)
            seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
            self.pipe.send({"seconds": seconds, "cpu_seconds": cpu, **self.tell(begin, self.mark())})

    def _next(self, count: int) -> Iterator[Batch]:
        for _ in range(count):
            yield next(self.batches)


def endless(config: Config, rank: int, workers: int, prepare: Callable[[Batch], Batch] = lambda batch: batch) -> Iterator[Batch]:
    """Epoch after epoch; the short last batches are left out. Reads, collates and prepares in a thread."""
    files = check_files(config.data.train, config.data)
    size = config.train.batch_size
    rows = files.first_rows(config.data.max_rows)

    def batches() -> Iterator[Batch]:
        while True:
            epoch = parquet_batches(files, config.data, size, rank=rank, workers=workers, max_rows=rows // size * size, prefetch=False)
            yield from map(prepare, epoch)

    return ahead(batches(), 2, "batches")


def run_ours(task: Task, rank: int, pipe: Connection) -> None:
    system, config = task.system, task.config
    together = 1 if system.apart else system.workers
    if system.apart:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=config.train.batch_size // system.workers))
    if together > 1:
        dist.init_process_group("gloo", f"file://{task.folder}/store", rank=rank, world_size=system.workers)
    row_bytes = dense_row_bytes(config.embedding)
    budget = None if system.share == 1 else int(sum(task.distinct) * row_bytes * system.share)
    worker = Worker(config, budget, make_exchange(), LocalDecider(config.policy))
    turns = Turns(task, endless(config, rank % together, together), pipe)
    turns.mark = lambda: (len(worker.history.steps), worker.step, worker.exchange.bytes_sent)

    def tell(begin: tuple[int, int, int], end: tuple[int, int, int]) -> dict[str, float]:
        values = worker.history.values
        phases = {}
        for phase in PHASES:
            spent = [each for each in values.get(f"time/{phase}", [])[begin[0] : end[0]] if not math.isnan(each)]
            phases[phase] = sum(spent) / (end[0] - begin[0])
        facts = {name: values[name][-1] for name in ("bytes/total", "bytes/dense_equivalent", "lookup/hit_rate")}
        return phases | facts | {"wire_bytes_per_step": (end[2] - begin[2]) / (end[1] - begin[1])}

    turns.tell = tell
    train(worker, lambda: turns)


def run_peer(task: Task, rank: int, pipe: Connection) -> None:
    system, config = task.system, task.config
    rows = [max(1, int(count * system.share)) for count in task.distinct]
    peer = peers.PEERS[system.kind](config, rows, system.borrow_dense)
    batches = endless(config, 0, 1, peer.place)
    for _ in range(task.warmup - PEER_WARMUP):
        next(batches)
    for batch in Turns(dataclasses.replace(task, warmup=PEER_WARMUP), batches, pipe):
        peer.step(batch)


def run_process(task: Task, rank: int, pipe: Connection) -> None:
    torch.set_num_threads(task.system.threads)
    keep_freed_memory()
    try:
        (run_ours if task.system.kind == "ours" else run_peer)(task, rank, pipe)
    except ImportError as error:
        pipe.send({"missing": str(error)})
    pipe.close()
    os._exit(0)  # at once: the reading thread never ends


class Contestant:
    """A system's processes, waiting for their turn."""

    def __init__(self, task: Task) -> None:
        self.system, self.steps = task.system, task.steps
        self.turns: list[list[dict[str, Any]]] = []
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        task = dataclasses.replace(task, folder=self._folder.name)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(task.system.workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=run_process, args=(task, rank, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is noticed
            self._pipes.append(mine)
            self._processes.append(process)
        self.missing = self._receive()[0].get("missing")

    def turn(self) -> None:
        for pipe in self._pipes:
            pipe.send(True)
        self.turns.append(self._receive())

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(False)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _receive(self) -> list[dict[str, Any]]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise SystemExit(f"{self.system.name}: a process died; its error stands above") from None

    def figures(self, samples: int) -> dict[str, Any]:
        """Medians over turns; of several workers the slowest's time, the first one's phases, the sum of bytes and CPU seconds."""
        seconds = [max(each["seconds"] for each in turn) for turn in self.turns]
        rates = [samples / each for each in seconds]
        first = [turn[0] for turn in self.turns]
        figures: dict[str, Any] = {
            "samples_per_s": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "cpu_us_per_sample": 1e6 * statistics.median(sum(each["cpu_seconds"] for each in turn) for turn in self.turns) / samples,
        }
        if self.system.kind == "ours":
            phases = {phase: 1e3 * statistics.median(each[phase] for each in first) for phase in PHASES}
            step = 1e3 * statistics.median(seconds) / self.steps
            figures["ms_by_phase"] = phases | {"other": step - sum(phases.values())}
            figures |= {name: first[-1][name] for name in ("bytes/total", "bytes/dense_equivalent", "lookup/hit_rate")}
            figures["wire_bytes_per_sample"] = (
                statistics.median(sum(each["wire_bytes_per_step"] for each in turn) for turn in self.turns) * self.steps / samples
            )
        return figures


def label(share: float) -> str:
    return "full" if share == 1 else f"1/{round(1 / share)}"


def systems(shares: list[float], borrow_dense: bool) -> list[System]:
    found = [System("ours", share, workers, threads) for share in shares for workers, threads in ((1, 2), (2, 1), (1, 1))]
    found.append(System("ours", 1.0, 2, 1, apart=True))
    found += [System(kind, share) for share in shares for kind in peers.PEERS]
    if borrow_dense:
        found += [System(kind, share, borrow_dense=True) for share in shares for kind in peers.PEERS]
    return found


def conclude(figures: dict[str, dict[str, Any]], shares: list[float]) -> dict[str, Any]:
    """The keys that are compared: best of ours, best of the peers, and how two workers scale."""
    rates: dict[str, float | None] = {name: each["samples_per_s"] for name, each in figures.items()}
    result: dict[str, Any] = {"speedup_vs_best_peer": {}, "speedup_vs_best_peer_with_our_dense_part": {}}
    best_peer: dict[tuple[str, bool], float] = {}
    for size in map(label, shares):
        ours = max(rates[f"ours_{size}_{shape}"] or 0 for shape in ("1x2", "2x1"))
        rates[f"ours_{size}"] = ours
        key = "scaling_1_to_2" if size == "full" else f"scaling_1_to_2_at_{size}"
        result[key] = (rates[f"ours_{size}_2x1"] or 0) / (rates[f"ours_{size}_1x1"] or 1)
        for borrowed in (False, True):
            found = [rate for kind in peers.PEERS if (rate := rates.get(f"{kind}_{size}{'_our_dense' if borrowed else ''}"))]
            if found:
                best_peer[size, borrowed] = max(found)
                key = "speedup_vs_best_peer_with_our_dense_part" if borrowed else "speedup_vs_best_peer"
                result[key][size] = ours / max(found)
                if size != "full" and ("full", borrowed) in best_peer:
                    result[key][f"{size}_vs_full"] = ours / best_peer["full", borrowed]
    result["scaling_1_to_2_apart"] = (rates["ours_full_2x1_apart"] or 0) / (rates["ours_full_1x1"] or 1)
    return {"samples_per_s": rates} | result


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    print(f"{'system':<24}{'samples/s':>11}{'lowest':>10}{'highest':>10}{'CPU us':>8}  ms a step by phase")
    for name, each in figures.items():
        phases = "  ".join(f"{phase} {value:.1f}" for phase, value in each.get("ms_by_phase", {}).items())
        print(
            f"{name:<24}{each['samples_per_s']:>11,.0f}{each['lowest']:>10,.0f}{each['highest']:>10,.0f}"
            f"{each['cpu_us_per_sample']:>8.1f}  {phases}"
        )


def measure(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    files = check_files(config.data.train, config.data)
    distinct = count_distinct(check_files(config.data.train, config.data), config.data, config.data.max_rows)
    shares = [1.0, SHARE]
    kind = "synthetic" if files.synthetic else "real"
    print(f"{files.total_rows:,} rows of {kind} data, {sum(distinct):,} distinct ids, batches of {config.train.batch_size}", flush=True)
    contestants: list[Contestant] = []
    missing: dict[str, str] = {}
    for system in systems(shares, arguments.our_dense_for_peers):
        if arguments.systems and not any(system.name.startswith(each) for each in arguments.systems):
            continue
        task = Task(system, config, distinct, arguments.warmup, config.tracking.log_every, arguments.steps, "")
        contestant = Contestant(task)
        if contestant.missing:
            missing[system.kind] = contestant.missing
            contestant.close()
            continue
        contestants.append(contestant)
    for _ in range(arguments.turns):
        for contestant in contestants:
            contestant.turn()
    figures = {each.system.name: each.figures(arguments.steps * config.train.batch_size) for each in contestants}
    for contestant in contestants:
        contestant.close()
    print_table(figures)
    for name, why in missing.items():
        print(f"{name}: not measured ({why}); to install the peers: {peers.HOW_TO_INSTALL}")
    result = conclude(figures, shares) if not arguments.systems else {}
    facts = {
        "data": kind,
        "rows": files.total_rows,
        "distinct_ids": sum(distinct),
        "batch_size": config.train.batch_size,
        "dim": config.embedding.dim,
        "model": dataclasses.asdict(config.model),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "turns": arguments.turns,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }
    return result | {"systems": figures, "missing": missing, "setting": facts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's configuration; synthetic data if left out")
    parser.add_argument("--rows", type=int, default=SyntheticSpec.rows, help="of the synthetic data")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a turn; a multiple of tracking.log_every")
    parser.add_argument("--warmup", type=int, default=150, help="steps before the first turn")
    parser.add_argument("--systems", nargs="*", default=[], help="only those whose name begins so")
    parser.add_argument("--our-dense-for-peers", action="store_true", help="measure the peers with our dense part, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["train.workers=1", "embedding.optimizer=rowwise_adagrad", *arguments.overrides]
        result = measure(config_of(arguments.config, arguments.rows, folder, settings), arguments)
    print(json.dumps({key: value for key, value in result.items() if key not in ("systems", "setting")}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
