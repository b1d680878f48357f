"""One Ray Train worker. Each is a process that has to start before training does: MLflow and plots are imported where rank 0 needs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
import torch

from fiited_ray import checkpoint
from fiited_ray.allocator import keep_freed_memory
from fiited_ray.coordinator import WAIT_SECONDS, RemoteDecider
from fiited_ray.data import parquet_batches, ray_batches
from fiited_ray.data.files import Files
from fiited_ray.exchange import make_exchange
from fiited_ray.logs import log_folder, logging_as
from fiited_ray.store import backends
from fiited_ray.train.loop import Batches, Stopped, Worker, train
from fiited_ray.train.plan import Plan
from fiited_ray.train.resume import restore_last
from fiited_ray.train.stopping import STOPPED, OnPreemption, poll_stop
from fiited_ray.watchdog import Watchdog

if TYPE_CHECKING:
    from fiited_ray.run_writer import RunWriter
    from fiited_ray.tracking_address import RunRef


def work(setup: dict[str, Any]) -> None:
    """Train as one of the workers; what the driver set up says what, and whom to tell."""
    plan: Plan = setup["plan"]
    config = plan.config
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.train.threads)
    keep_freed_memory()
    if config.train.use_gpu:
        use_gpu()
    logs = log_folder(setup["output"], config.name)
    journal = logs / "metrics-not-in-mlflow.jsonl" if logs is not None else None
    writer = _writer(setup["run"], config.tracking.patience_seconds, journal) if rank == 0 else None
    tell = (lambda text: setup["coordinator"].tell.remote(text)) if rank == 0 else (lambda text: None)
    exchange = make_exchange(config.train.timeout_seconds)
    decider = RemoteDecider(setup["coordinator"], min(WAIT_SECONDS, config.train.timeout_seconds / 2))  # the others wait for its word
    worker = Worker(config, plan.budget_bytes, exchange, decider, writer, tell, distinct_ids=plan.distinct_ids)
    worker.scored = lambda values: ray.train.report({**values, "step": worker.step})

    def open_files(name: str, files: Files, batch_size: int, first: Callable[[], int], max_rows: int | None = None) -> Batches:
        if config.data.reader == "ray":
            total = files.first_rows(max_rows)
            return lambda: ray_batches(ray.train.get_dataset_shard(name), config.data, batch_size, rank, workers, first(), total=total)
        return lambda: parquet_batches(files, config.data, batch_size, rank=rank, workers=workers, max_rows=max_rows, first_step=first())

    batch_size = config.train.batch_size
    test = open_files("test", plan.test_files, batch_size * 4, lambda: 0) if plan.test_files else None
    training = open_files("train", plan.files, batch_size, lambda: worker.position.batch, config.data.max_rows)

    with logging_as(rank, lambda: worker.step, logs, config.train.debug):
        restore_last(worker, setup["lineage"], plan.files)
        _train(setup, worker, training, test, writer, logs)
    if writer is not None:
        writer.close()


def _train(
    setup: dict[str, Any], worker: Worker, training: Batches, test: Batches | None, writer: RunWriter | None, logs: Path | None
) -> None:
    """Train from where the worker stands, and save."""
    plan: Plan = setup["plan"]
    config, rank = plan.config, worker.exchange.rank
    saver = checkpoint.Saver(worker, checkpoint.RayPublisher(), setup["lineage"], plan.files)
    watchdog = Watchdog(config.train.stall_seconds, config.train.timeout_seconds, rank, logs)
    stop_polling = poll_stop(setup["coordinator"], worker) if rank == 0 else nullcontext()
    with watchdog, stop_polling:
        worker.beat = watchdog.beat
        try:
            with _watching(setup["run"], config.tracking.system_every) if rank == 0 else nullcontext():
                metrics = train(worker, training, test, OnPreemption(saver, worker))
        except Stopped:
            saver.save(metrics={**worker.history.last, STOPPED: float(worker.step)})
            saver.wait()
            return
        saver.save(finished=True, metrics={**metrics, "step": worker.step})
        saver.wait()
        if writer is not None:
            from fiited_ray.train.plots_of_run import log_plots

            log_plots(writer, worker, metrics, plan.files.synthetic)


def _writer(run: RunRef, patience_seconds: float, journal: Path | None) -> RunWriter:
    from fiited_ray.run_writer import RunWriter

    return RunWriter(run, patience_seconds, journal)


def _watching(run: RunRef, seconds: float) -> AbstractContextManager[None]:
    from fiited_ray.tracked_system import watching

    return watching(run, seconds)


def use_gpu() -> None:
    """Make the worker's GPU the current one.

    Raises:
        RuntimeError: when there is none, or no store for it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("train.use_gpu: torch sees no GPU here; install a torch for CUDA and a driver, or set it to false")
    if "cuda" not in backends():
        raise RuntimeError(
            "train.use_gpu: the store was not built for GPUs here; rebuild with nvcc and a torch for CUDA, or set it to false"
        )
    torch.cuda.set_device(ray.train.torch.get_device())
