"""Trains a configuration with several processes on gloo, without Ray; for tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fiited_ray.config import Config
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import check_files, parquet_batches
from fiited_ray.exchange import Exchange, Group, make_exchange
from fiited_ray.train.loop import Worker, train


class AsOnGpus(Group):
    """Takes for tensors of a GPU what would be one there: rows and gradients go by torch.distributed's own collectives (here gloo's)."""

    def _by_sockets(self, values: Tensor) -> bool:
        return values.dtype in (torch.int64, torch.float64)  # sizes, and sums of the host's numbers


def as_on_gpus() -> Exchange:
    return AsOnGpus(dist.new_group())


def run(config: Config, budget_bytes: int | None, workers: int) -> list[dict[str, Any]]:
    """Train; returns for each worker its losses, rows by (table, id) -> width, final metrics and most bytes at any step."""
    return run_each([(config, budget_bytes)], workers)[0]


def run_each(
    tasks: list[tuple[Config, int | None]], workers: int, exchange: Callable[[], Exchange] = make_exchange
) -> list[list[dict[str, Any]]]:
    """`run` for each configuration and budget, one after the other in the same processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (tasks, workers, folder, exchange), nprocs=workers)
        return [[torch.load(Path(folder) / f"{at}-{rank}.pt", weights_only=False) for rank in range(workers)] for at in range(len(tasks))]


def _work(rank: int, tasks: list[tuple[Config, int | None]], workers: int, folder: str, exchange: Callable[[], Exchange]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=workers)
    for at, (config, budget_bytes) in enumerate(tasks):
        torch.save(_train(rank, config, budget_bytes, workers, exchange()), Path(folder) / f"{at}-{rank}.pt")
    dist.destroy_process_group()


def _train(rank: int, config: Config, budget_bytes: int | None, workers: int, exchange: Exchange) -> dict[str, Any]:
    worker = Worker(config, budget_bytes, exchange, LocalDecider(config.policy))
    files = check_files(config.data.train, config.data)
    size = config.train.batch_size
    totals: list[int] = []

    def note_total(embedding: Any, inputs: Any) -> None:  # before each step: what the last one and its round have left
        if embedding.training:
            totals.append(int(worker.exchange.all_reduce(torch.tensor([worker.shard.stats().total]))[0]))

    worker.embedding.register_forward_pre_hook(note_total)

    def batches(rows: int | None = None) -> Any:
        return parquet_batches(files, config.data, size, rank=rank, workers=workers, max_rows=rows)

    metrics = train(worker, batches, lambda: batches(4 * size))
    rows = worker.shard.export_rows()
    widths = dict(zip(zip(rows.tables.tolist(), rows.raw_ids.tolist(), strict=True), rows.widths.tolist(), strict=True))
    losses = worker.exchange.all_reduce(torch.tensor(worker.losses, dtype=torch.float64)).tolist()
    return {"losses": losses, "widths": widths, "metrics": metrics, "totals": totals, "bytes_sent": worker.bytes_sent}
