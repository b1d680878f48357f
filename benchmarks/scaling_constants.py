"""What an item of work costs on one core here, for `scale_model.Costs`; and the curve of wire bytes. Used by `scaling.py`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scale_model import EXCHANGES, Costs, Workload, dense_shape, wire_bytes_of_key

from fiited_ray.config import Config
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, parquet_batches
from fiited_ray.exchange import Solo
from fiited_ray.models import build_model
from fiited_ray.plots import BLUE, GREY, ORANGE
from fiited_ray.store import ShardSpec, VhpiShard, ops
from fiited_ray.train.loop import Worker, train_step

_SLICES = 8  # workers whose keys meet at an owner
_BATCHES = 40
_TINY = 8  # rows of a batch that is all overhead


def measure(config: Config) -> dict[str, float]:
    """CPU seconds by item, one thread; every row at full width, as the models' linear costs want it."""
    torch.set_num_threads(1)
    files, size = check_files(config.data.train, config.data), config.train.batch_size

    def read(workers: int) -> list[Batch]:
        return list(parquet_batches(files, config.data, size, workers=workers, max_rows=_BATCHES * size, prefetch=False))

    rows = _BATCHES * size
    read(1)
    whole, part = _median(lambda: read(1), 3) / rows, _median(lambda: read(64), 3) / rows
    costs = {"collate": (whole - part) / (1 - 1 / 64), "decode": part - (whole - part) / 63}
    batches = read(1)
    narrow, wide = (_store_costs(config, batches, chunks) for chunks in (1, Workload.chunks))
    more = Workload.chunk * (Workload.chunks - 1)  # numbers by which the two differ
    costs |= {name: wide[name] for name in ("dedup", "merge", "lookup", "pool_value", "fold_value", "round_row")}
    costs["read_value"] = (wide["read"] - narrow["read"]) / more
    costs["read"] = max(0.0, narrow["read"] - Workload.chunk * costs["read_value"])
    costs["update_value"] = (wide["update"] - narrow["update"]) / more / wide["arrivals_of_key"]
    costs["update"] = max(0.0, narrow["update"] - Workload.chunk * wide["arrivals_of_key"] * costs["update_value"])
    costs["flop"] = _flop_cost(config)
    costs["step"] = _step_cost(config, batches[0])
    return costs


def with_constants(results: dict[str, Any]) -> dict[str, Any]:
    """The results, with the costs that the model takes from all parts measured so far."""
    constants: dict[str, float] = dict(results.get("costs", {}))
    exchanges = results.get("train", {}).get("exchange", [])
    if len(exchanges) > 1:
        peers = [each["workers"] - 1 for each in exchanges]
        message, collective = np.polyfit(peers, [each["small_s"] for each in exchanges], 1)
        constants |= {"collective": max(0.0, float(collective)), "message": float(message)}
        constants["wire_byte"] = statistics.median(each["byte_s"] for each in exchanges)
        tiny = {run["workers"]: run["cpu_us_per_sample"] * 1e-6 * run["batch"] / run["workers"] for run in _tiny_runs(results)}
        more = [tiny[workers] - tiny[1] - EXCHANGES * (collective + (workers - 1) * message) for workers in tiny if workers > 1]
        if more:
            constants["group"] = max(0.0, float(statistics.median(more)))
    if "coordinator" in results:
        constants["decide"] = statistics.median(each["sum_actor_cpu_s"] for each in results["coordinator"]["rounds"])
    assert set(constants) <= {each.name for each in dataclasses.fields(Costs)}
    return results | {"constants": constants}


def _tiny_runs(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in results["train"]["runs"] if run["kind"] == "tiny"]


def _store_costs(config: Config, batches: Sequence[Batch], chunks: int) -> dict[str, float]:
    """Seconds by item for rows of so many chunks; every id of the batches has one."""
    dim = Workload.chunk * chunks
    config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, dim=dim, chunk=Workload.chunk))
    shard, features = VhpiShard(ShardSpec.of(config, None)), len(config.data.features)
    tables = torch.tensor(config.data.feature_tables, dtype=torch.int32)
    ends = [batch.offsets[batch.rows :: batch.rows].contiguous() for batch in batches]
    seconds: dict[str, list[float]] = {}

    def clock(name: str, items: int, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds.setdefault(name, []).append((time.process_time() - start) / items)
        return result

    step = 0
    for _ in range(2):  # the first pass makes the rows
        seconds.clear()
        for batch, end in zip(batches, ends, strict=True):
            step += 1
            local = clock("dedup", batch.ids.numel(), lambda: ops.dedup_ids(batch.ids, end, tables, 0, 1))  # noqa: B023
            parts = [_slice_of(batch, tables, at) for at in range(_SLICES)]
            asked = [torch.cat([part[at] for part in parts]) for at in range(3)]
            keys, key_tables, counts, inverse = clock("merge", asked[0].numel(), lambda: ops.dedup_keys(*asked))  # noqa: B023
            found = clock("lookup", keys.numel(), lambda: shard.lookup(keys, key_tables, counts, training=True, step=step))  # noqa: B023
            values = clock("read", inverse.numel(), lambda: shard.read(found, inverse))  # noqa: B023
            seconds.setdefault("arrivals_of_key", []).append(inverse.numel() / keys.numel())
            gradients = values * 1e-3 + 1e-3
            clock("update", keys.numel(), lambda: shard.update(found, gradients, None, 0.05, step, target=inverse))  # noqa: B023
            there = shard.lookup(local.keys, local.tables, local.counts, training=False)
            bags = ops.Bags(local.inverse, batch.offsets, None, features, True, Workload.chunk, chunks)
            rows = shard.read(there)
            pooled = clock("pool_value", batch.ids.numel() * dim, lambda: ops.pool(rows, there.widths, bags))  # noqa: B023
            clock("fold_value", batch.ids.numel() * dim, lambda: ops.wire_gradients(pooled, there.widths, bags))  # noqa: B023
    importance = np.sort(shard.export_rows().importance.numpy())
    shard.resize(float(importance[len(importance) // 2]))
    for factor in (1.02, 1.0) * 4:

        def hold_round(threshold: float = factor * float(importance[len(importance) // 2])) -> None:
            shard.histogram()
            shard.resize(threshold)

        clock("round_row", shard.stats().rows, hold_round)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _slice_of(batch: Batch, tables: torch.Tensor, at: int) -> ops.Deduped:
    """What worker `at` of several would ask for: the distinct keys of its rows."""
    features, rows = len(tables), batch.rows
    begin, end = at * rows // _SLICES, (at + 1) * rows // _SLICES
    cuts = [(int(batch.offsets[f * rows + begin]), int(batch.offsets[f * rows + end])) for f in range(features)]
    ids = torch.cat([batch.ids[first:last] for first, last in cuts])
    ends = torch.cumsum(torch.tensor([last - first for first, last in cuts]), 0)
    return ops.dedup_ids(ids, ends, tables, 0, 1)


def _flop_cost(config: Config) -> float:
    """Seconds of a floating-point operation of the dense part, from two batch sizes; the optimizer step does not grow with them."""
    features, columns = len(config.data.features), len(config.data.dense)
    model = build_model(config.model, columns, features, Workload.chunk * Workload.chunks)
    optimizer = torch.optim.Adam(model.parameters())
    seconds = []
    sizes = (512, 4096)
    for size in sizes:
        dense, vectors = torch.randn(size, columns), torch.randn(size, features, Workload.chunk * Workload.chunks, requires_grad=True)

        def step() -> None:
            optimizer.zero_grad()
            model(dense, vectors).sum().backward()  # noqa: B023
            optimizer.step()

        step()
        seconds.append(_median(step, 9))
    return (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]) / (3 * dense_shape(Workload(1e6))[1])


def _step_cost(config: Config, batch: Batch) -> float:
    """Seconds of a step with next to no rows in it."""
    rows = batch.rows
    features = len(config.data.features)
    bags = [(f * rows + at) for f in range(features) for at in range(_TINY)]
    ids = torch.cat([batch.ids[int(batch.offsets[bag]) : int(batch.offsets[bag]) + 1] for bag in bags])
    tiny = Batch(batch.dense[:_TINY], batch.labels[:_TINY], ids, torch.arange(len(ids) + 1))
    worker = Worker(config, None, Solo(), LocalDecider(config.policy))
    train_step(worker, tiny)
    return _median(lambda: train_step(worker, tiny), 50)


def _median(work: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def plot_wire(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes on the wire a sample against the mean live width of the keys asked for; synthetic data."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Bytes on the wire by live width: two workers, synthetic data", loc="left", fontsize=11)
    axes.set_xlabel("mean live width of the vectors asked for (chunks of 8, 4 is full)")
    axes.set_ylabel("bytes a sample, both workers")
    axes.spines[["top", "right"]].set_visible(False)
    width = [run["live_width"] for run in runs]
    axes.plot(width, [run["wire_bytes_per_sample"] for run in runs], "o-", color=BLUE, label="measured")
    half_of_keys = runs[0]["keys_per_sample"] / 2  # two workers: every other key is one's own
    grid = np.linspace(0, Workload.chunks, 81)
    axes.plot(grid, half_of_keys * wire_bytes_of_key(Workload(1e6), grid), color=ORANGE, label="model, all keys of mean width", zorder=1)
    axes.plot(grid, half_of_keys * 8 * Workload.chunk * grid, color=GREY, linestyle="--", label="in proportion to live width alone")
    for run in runs:
        share = "full" if run["share"] is None else f"1/{round(1 / run['share'])}"
        axes.annotate(share, (run["live_width"], run["wire_bytes_per_sample"]), xytext=(-4, 6), textcoords="offset points", ha="right")
    axes.set_xlim(0, Workload.chunks + 0.1)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
