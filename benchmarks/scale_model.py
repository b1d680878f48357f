"""What a step, a round and the coordinator cost from 2 to 1024 workers and 10^6 to 10^12 ids: a model on paper, in code.

    python benchmarks/scale_model.py [--measured docs/scaling.json] [--budget 1/16] [--global-batch N] [--json FILE]

Nothing overlaps: a step is the sum of its terms, so times are upper bounds. `docs/scaling.md` has the formulas in words and says where
the model was checked. CPU costs are seconds of one core, measured by `benchmarks/scaling.py`; a graphics processor's are not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fiited_ray.data.synthetic import CARDINALITIES, DENSE
from fiited_ray.store.layout import BUCKETS

WORKERS = (2, 4, 8, 16, 64, 256, 1024)
IDS = tuple(10**power for power in range(6, 13))
KEY_BYTES, WIDTH_BYTES = 16, 1  # a key asked for: key, table and count; the answer's width
METADATA_BYTES = 22  # of a row: header 16, index about 6
REPORT_BYTES = 32_792  # a histogram of int64 [2, 2048] and three numbers
EXCHANGES = 4  # all-to-alls in a step: keys, sums, widths with vectors, gradients
NOT_ROWS = 0.02 + 1 / 40 + 0.01  # of the budget: sketch, structure, headroom


@dataclass(frozen=True)
class Costs:
    """Seconds of work for each item, on one core (or one GPU). Defaults: a 2-core virtual machine (AMD EPYC), see docs/scaling.json."""

    step: float = 9.3e-04  # once a step: Python, autograd, metrics, dense optimizer
    group: float = 2.9e-03  # once a step of several workers: what Python does around exchanges
    decode: float = 2.1e-07  # a row of the GLOBAL batch: every worker decodes all Parquet columns
    collate: float = 2.4e-07  # a row of the worker's own batch
    dedup: float = 5.7e-09  # a lookup
    merge: float = 7.9e-09  # a key asked of an owner
    lookup: float = 2.0e-08  # a distinct key at its owner
    read: float = 7.4e-09  # a key answered
    read_value: float = 1.3e-10  # a number of its vector
    pool_value: float = 2.4e-10  # a number of a lookup's vector
    fold_value: float = 4.5e-10  # a number of a lookup's gradient
    update: float = 3.7e-08  # a distinct key updated by its owner
    update_value: float = 1.7e-10  # a number of its gradient
    flop: float = 6.2e-12  # of the dense part
    round_row: float = 6.0e-09  # a resident row: histogram, shrink, grow
    decide: float = 1.4e-03  # the coordinator: a call with the sum of all reports, decided and answered
    collective: float = 7.0e-06  # a collective operation, whatever the number of peers
    message: float = 1.1e-05  # a peer of an all-to-all
    wire_byte: float = 2.9e-10  # the processor's work to send and receive a byte


@dataclass(frozen=True)
class Cluster:
    """Machines. A worker is one core with one thread (the default, `train.threads: 1`) or one GPU."""

    name: str
    costs: Costs
    near: int  # workers in a machine
    near_bytes_per_s: float  # one worker to another of its machine, each way
    far_bytes_per_s: float  # a worker's part of its machine's network, each way
    memory_bytes: float  # a worker's part of its machine's memory
    coordinator_bytes_per_s: float
    cores: float = math.inf  # that all workers of a machine share


@dataclass(frozen=True)
class Workload:
    """A job: Criteo-shaped tables (cardinalities scaled to `ids`), power-law lookups, DLRM."""

    ids: float
    batch: int = 4096  # rows of one worker
    budget: float | None = 1 / 16  # share of the dense-equivalent bytes; None: every id has a full row
    skew: float = 1.1
    chunk: int = 8
    chunks: int = 4
    alpha: float = 2.0
    state_bytes: int = 4  # optimizer state of a row
    bag: float = 2.5  # ids in the multi-hot column; the others have one
    bottom: tuple[int, ...] = (256, 64)
    top: tuple[int, ...] = (256, 128)
    interval: int = 100  # steps between rounds
    split_read: bool = False  # as if each worker decoded its own rows only, which it does not

    @property
    def dim(self) -> int:
        return self.chunk * self.chunks

    @property
    def bags(self) -> np.ndarray:
        """Lookups of a row by feature."""
        return np.array([1.0] * (len(CARDINALITIES) - 1) + [self.bag])


@dataclass(frozen=True)
class Popularity:
    """Ids in groups alike: `ids` of them, each looked up `rate` times in a row of the batch, on average."""

    ids: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True)
class Widths:
    """What a budget buys: the widths of a popularity's groups, and the rows of each width."""

    of_group: np.ndarray
    rows: tuple[float, ...]  # of width 1..k
    bytes: float


def popularity(work: Workload) -> Popularity:
    """The power law of `fiited_ray/data/synthetic.py`, id by id up to rank 100 and in groups of 5 % beyond."""
    counts, rates = [], []
    for cardinality, bag in zip(CARDINALITIES, work.bags, strict=True):
        size = max(min(cardinality, 100), cardinality * work.ids / sum(CARDINALITIES))
        steps = max(0, math.ceil(math.log(max(1.0, size / 100)) / math.log(1.05)))
        ranks = np.unique(np.minimum(np.concatenate([np.arange(101), 100 * 1.05 ** np.arange(1, steps + 1)]), size))
        above = (1 + ranks) ** (1 - work.skew)
        counts.append(np.diff(ranks))
        rates.append(bag * -np.diff(above) / (1 - above[-1]) / counts[-1])
    return Popularity(np.concatenate(counts), np.concatenate(rates))


def asked(ids: Popularity, rows: float) -> np.ndarray:
    """Chance that an id is among those of a batch of so many rows."""
    return -np.expm1(-rows * ids.rate)


def row_bytes(work: Workload, width: int) -> int:
    return METADATA_BYTES + 4 * work.chunk * width + work.state_bytes


def widths(work: Workload, ids: Popularity) -> Widths:
    """Widths at the threshold that meets the budget, importance in proportion to popularity."""
    if work.budget is None:
        return _widths_at(0.0, work, ids)
    room = work.budget * ids.ids.sum() * (4 * work.dim + work.state_bytes) * (1 - NOT_ROWS)
    low, high = 0.0, float(ids.rate.max())
    if _widths_at(low, work, ids).bytes <= room:
        return _widths_at(low, work, ids)
    for _ in range(200):
        middle = math.sqrt(max(low, high * 1e-6) * high)
        low, high = (low, middle) if _widths_at(middle, work, ids).bytes <= room else (middle, high)
    return _widths_at(high, work, ids)


def _widths_at(threshold: float, work: Workload, ids: Popularity) -> Widths:
    cuts = threshold * work.alpha ** np.arange(work.chunks)
    of_group = (ids.rate[:, None] > cuts).sum(1)
    rows = tuple(float(ids.ids[of_group == width].sum()) for width in range(1, work.chunks + 1))
    return Widths(of_group, rows, sum(count * row_bytes(work, width) for width, count in enumerate(rows, 1)))


def dense_shape(work: Workload) -> tuple[int, int]:
    """(parameters, flops a row forward) of DLRM's towers and dot products."""
    vectors = len(CARDINALITIES) + 1
    bottom = (DENSE, *work.bottom, work.dim)
    top = (vectors * (vectors - 1) // 2 + work.dim, *work.top, 1)
    weights = sum(a * b for tower in (bottom, top) for a, b in pairwise(tower))
    return weights + sum(bottom[1:]) + sum(top[1:]), 2 * weights + 2 * vectors * vectors * work.dim


def wire_bytes_of_key(work: Workload, width: np.ndarray | float) -> np.ndarray | float:
    """Key there, width and vector back, gradient there: at live width, and one folded chunk where dimensions are missing."""
    return KEY_BYTES + WIDTH_BYTES + 4 * work.chunk * (width + np.minimum(work.chunks, width + 1))


def busiest(ids: Popularity, rows: int, workers: int) -> float:
    """Keys asked of the busiest owner over the mean: an owner of hot ids is asked for them by everybody, ids being dealt by hash.

    The mean plus sqrt(2 ln W) standard deviations, and the uneven dealing of 1024 virtual buckets.
    """
    q = asked(ids, rows)
    mean = float((ids.ids * q).sum())
    square = float((ids.ids * (workers * q * (1 - q) + (workers * q) ** 2)).sum())
    deviation = math.sqrt(square / workers * (1 - 1 / workers)) / mean
    return (1 + math.sqrt(2 * math.log(workers)) * deviation) * math.ceil(BUCKETS / workers) * workers / BUCKETS


def all_to_all_seconds(cluster: Cluster, workers: int, sent: float) -> float:
    """Each worker sends `sent` bytes, an even part to each, its own included; near and far go side by side."""
    near = max(0, min(workers, cluster.near) - 1) / workers * sent / cluster.near_bytes_per_s
    far = max(0, workers - cluster.near) / workers * sent / cluster.far_bytes_per_s
    return max(near, far) + (workers - 1) / workers * sent * cluster.costs.wire_byte


def all_reduce_seconds(cluster: Cluster, workers: int, size: float) -> float:
    """A ring: 2 (W - 1) messages of 1/W of the bytes; between machines a ring passes once, at the whole machine's speed."""
    slowest = cluster.near_bytes_per_s if workers <= cluster.near else min(cluster.near_bytes_per_s, cluster.far_bytes_per_s * cluster.near)
    sent = 2 * (workers - 1) / workers * size
    return sent / slowest + sent * cluster.costs.wire_byte + 2 * (workers - 1) * cluster.costs.message


def _taking_turns(cluster: Cluster, workers: int) -> Cluster:
    """The same cluster, its workers' work lasting longer where they are more than their machine's cores. The coordinator's does not."""
    wait = max(1.0, min(workers, cluster.near) / cluster.cores)
    work = {name: seconds * wait for name, seconds in asdict(cluster.costs).items() if name != "decide"}
    return replace(cluster, costs=replace(cluster.costs, **work))


def predict(cluster: Cluster, work: Workload, workers: int) -> dict[str, Any]:
    """All about one size: `terms` in seconds a step, which sum to `step`; `round`, `coordinator` in seconds a round; memory."""
    ids, cluster = popularity(work), _taking_turns(cluster, workers)
    cost = cluster.costs
    wide = widths(work, ids)
    q = asked(ids, work.batch)
    unique = float((ids.ids * q).sum())  # keys a worker asks for, and is asked for
    owned = float((ids.ids * asked(ids, work.batch * workers)).sum()) / workers  # distinct ones among those it is asked for
    lookups = work.batch * float(work.bags.sum())
    gradient_width = np.minimum(work.chunks, wide.of_group + 1)  # live, and one folded chunk where dimensions are missing
    width = float((ids.ids * q * wide.of_group).sum()) / unique
    gradient = work.chunk * float((ids.ids * q * gradient_width).sum()) / unique
    parameters, flops = dense_shape(work)
    alone = workers == 1
    hot = 1.0 if alone else busiest(ids, work.batch, workers)
    owner = (0 if alone else unique * (cost.merge + cost.read + cost.read_value * width * work.chunk)) + owned * cost.lookup
    update = owned * cost.update + unique * gradient * cost.update_value
    # reports summed -> the first worker asks the coordinator -> 3 small all_reduces: its answer, limits, counters
    summed = 0 if alone else all_reduce_seconds(cluster, workers, REPORT_BYTES)
    coordinator = summed + cost.decide + REPORT_BYTES / cluster.coordinator_bytes_per_s
    rows = sum(wide.rows) / workers
    resize = rows * cost.round_row + (0 if alone else 3 * all_reduce_seconds(cluster, workers, 64))
    terms = {
        "overhead": cost.step + (0.0 if alone else cost.group),
        "read": ((1 if work.split_read else workers) * cost.decode + cost.collate) * work.batch,
        "dedup": lookups * cost.dedup,
        "keys": 0.0 if alone else all_to_all_seconds(cluster, workers, unique * KEY_BYTES),
        "owner": owner,
        "vectors": 0.0 if alone else all_to_all_seconds(cluster, workers, unique * (WIDTH_BYTES + 4 * work.chunk * width)),
        "pool": lookups * work.dim * (cost.pool_value + cost.fold_value),
        "dense": 3 * flops * work.batch * cost.flop,
        "allreduce": 0.0 if alone else all_reduce_seconds(cluster, workers, 4 * parameters),
        "gradients": 0.0 if alone else all_to_all_seconds(cluster, workers, unique * 4 * gradient),
        "update": update,
        "latency": 0.0 if alone else EXCHANGES * (cost.collective + (workers - 1) * cost.message),
        "round": (resize + coordinator) / work.interval,
    }
    terms["busiest"] = (hot - 1) * sum(terms[name] for name in ("keys", "owner", "vectors", "gradients", "update"))
    step = sum(terms.values())
    elsewhere = (workers - 1) / workers
    largest = max(wide.rows)
    address_limit = 2 ** (32 - math.ceil(math.log2(work.chunks))) - 1  # rows of a width: 32 bits hold width and position
    held = wide.bytes / (1 - NOT_ROWS) / workers
    return {
        "workers": workers,
        "ids": work.ids,
        "terms": terms,
        "step": step,
        "dominant": max(terms, key=lambda name: terms[name]),
        "samples_per_s": work.batch * workers / step,
        "round": resize + coordinator,
        "coordinator": coordinator,
        "lookups": lookups,
        "unique": unique,
        "live_width": width,
        "wire_bytes_per_sample": elsewhere * float((ids.ids * q * wire_bytes_of_key(work, wide.of_group)).sum()) / work.batch,
        "rows_per_worker": rows,
        "bytes_per_worker": held,
        "fits_memory": held <= cluster.memory_bytes,
        "fits_addresses": largest / workers <= address_limit,
        "least_workers": max(1, math.ceil(held * workers / cluster.memory_bytes), math.ceil(largest / address_limit)),
    }


def cpu_cluster(costs: Costs = Costs()) -> Cluster:
    """Machines of 16 workers with one core each, 128 GB for embeddings, one 25 Gb/s Ethernet port that the workers share.

    The processors' work for each byte is in `wire_byte`, which is measured; so the near side costs nothing beyond it.
    """
    return Cluster("CPU, 25 Gb/s Ethernet", costs, 16, math.inf, 25e9 / 8 / 16, 128e9 / 16, 25e9 / 8)


def gpu_cluster(costs: Costs = Costs()) -> Cluster:
    """Machines of 8 NVIDIA H100 SXM. Published figures, not the store's own of docs/store.md, and what is assumed says so.

    Memory 80 GB (64 for embeddings, assumed) at 3.35 TB/s, 67 TFLOP/s in float32, NVLink 900 GB/s both ways together: NVIDIA H100
    data sheet. ConnectX-7 NDR InfiniBand, 400 Gb/s for each GPU, and 112 cores a machine: NVIDIA DGX H100 data sheet. Random rows at
    0.57 of the memory's speed and 0.92 ns a key for hashing: what is left of 1.338 ms forward and 0.847 ms backward (1.05 M lookups,
    350 k distinct, D = 128, Adam, H100) that NVIDIA recsys-examples (dynamicemb, benchmark_results.json) publishes, once its bytes are
    taken out. Assumed: half of the peak for the dense towers, 20 us for a collective and 2 us for each peer (NCCL, InfiniBand), the
    host's part of a step as on the CPU, decoding and collation spread over a GPU's 14 cores.
    """
    memory, hash_ = 0.57 * 3.35e12, 0.92e-9
    host = 112 / 8
    h100 = Costs(
        step=costs.step,
        group=costs.group,
        decode=costs.decode / host,
        collate=costs.collate / host,
        dedup=hash_,
        merge=hash_,
        lookup=128 / memory,  # a line of the index, a row's header
        read=32 / memory,
        read_value=8 / memory,  # read and written
        pool_value=4 / memory,
        fold_value=4 / memory,
        update=64 / memory,
        update_value=12 / memory,  # gradient read, row read and written
        flop=1 / (0.5 * 67e12),
        round_row=3 * 64 / memory,
        decide=costs.decide,
        collective=20e-6,
        message=2e-6,
        wire_byte=0.0,
    )
    return Cluster("H100, NVLink and InfiniBand", h100, 8, 450e9, 50e9, 64e9, 50e9)


def measured_costs(measured: dict[str, Any]) -> Costs:
    """Costs from what `benchmarks/scaling.py` wrote."""
    return replace(Costs(), **measured["constants"])


def check(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of 1 to 8 workers on one machine beside what the model says of them.

    Batches were collated beforehand, so reading costs nothing here; processors' work is that of all workers, the coordinator's apart.
    """
    train, silent = measured["train"], {"decode": 0.0, "collate": 0.0}
    costs = replace(measured_costs(measured), **silent)
    machine = Cluster("this machine", costs, 64, math.inf, math.inf, math.inf, math.inf, cores=train["cores"])
    rows = []
    for run in train["runs"]:
        workers, batch = run["workers"], run["batch"] // run["workers"]
        work = Workload(train["vocabulary"], batch, run["share"], interval=train["interval"])
        wall = predict(machine, work, workers)
        alone = predict(replace(machine, cores=math.inf, costs=replace(costs, decide=0.0)), work, workers)
        rows.append({
            "kind": run["kind"],
            "workers": workers,
            "step_ms": (run["step_ms"], 1e3 * wall["step"]),
            "cpu_us_per_sample": (run["cpu_us_per_sample"], 1e6 * alone["step"] / batch),
            "keys_per_sample": (run.get("keys_per_sample", math.nan), alone["unique"] / batch),
        })  # fmt: skip
    return rows


def print_check(rows: list[dict[str, Any]]) -> None:
    names = ("step_ms", "cpu_us_per_sample", "keys_per_sample")
    print(f"\nThis machine, measured and predicted\n\n{'':<7}{'workers':>8} " + " ".join(f"{name:>20}" for name in names))
    for row in rows:
        print(f"{row['kind']:<7}{row['workers']:>8} " + " ".join(f"{row[name][0]:>9.2f} {row[name][1]:>10.2f}" for name in names))


def table(cluster: Cluster, base: Workload, global_batch: int | None = None) -> list[dict[str, Any]]:
    """Predictions for all sizes; with `global_batch`, its rows are dealt to the workers, else each has `base.batch`."""
    batches = {workers: base.batch if global_batch is None else max(1, global_batch // workers) for workers in WORKERS}
    return [predict(cluster, replace(base, ids=ids, batch=batches[workers]), workers) for workers in WORKERS for ids in IDS]


def print_table(name: str, rows: list[dict[str, Any]]) -> None:
    terms = list(rows[0]["terms"])
    print(f"\n{name}: ms a step by term; ! memory is too small, # addresses end, and the workers that would do\n")
    print(f"{'workers':>7} {'ids':>6} {'step':>8} " + " ".join(f"{term[:9]:>9}" for term in terms), end="")
    print(f" {'dominant':>9} {'width':>6} {'samples/s':>11} {'round s':>8} {'coord. s':>8} {'MB/worker':>10}")
    for row in rows:
        flag = ("" if row["fits_memory"] else "!") + ("" if row["fits_addresses"] else "#")
        print(f"{row['workers']:>7} {row['ids']:>6.0e} {1e3 * row['step']:>8.1f} ", end="")
        print(" ".join(f"{1e3 * seconds:>9.2f}" for seconds in row["terms"].values()), end="")
        print(f" {row['dominant']:>9} {row['live_width']:>6.2f} {row['samples_per_s']:>11,.0f} {row['round']:>8.3f}", end="")
        print(f" {row['coordinator']:>8.3f} {row['bytes_per_worker'] / 1e6:>10,.0f}", f"{flag} {row['least_workers']:,}" if flag else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks/scaling.py; without it the constants in Costs")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 16), help="share of the dense-equivalent bytes")
    parser.add_argument("--batch", type=int, default=4096, help="rows of one worker")
    parser.add_argument("--global-batch", type=int, help="rows of all workers, instead")
    parser.add_argument("--split-read", action="store_true", help="as if each worker decoded its own rows only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text()) if arguments.measured else None
    costs = measured_costs(measured) if measured else Costs()
    if measured:
        print_check(check(measured))
    base = Workload(1e6, arguments.batch, float(arguments.budget), split_read=arguments.split_read)
    results = {each.name: table(each, base, arguments.global_batch) for each in (cpu_cluster(costs), gpu_cluster(costs))}
    for name, rows in results.items():
        print_table(name, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"costs": asdict(costs), "predictions": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
