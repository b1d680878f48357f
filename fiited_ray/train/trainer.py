"""The driver: starts the run, the coordinator and the Ray Train workers, and waits for them."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from fiited_ray import checkpoint, tracking
from fiited_ray.coordinator import RemoteDecider, start_coordinator
from fiited_ray.data import parquet_batches, ray_batches, ray_dataset
from fiited_ray.data.files import Files
from fiited_ray.data.reader import data_config
from fiited_ray.exchange import make_exchange
from fiited_ray.store import backends
from fiited_ray.summary import summary
from fiited_ray.train.loop import Batches, Worker, fit_budget, train
from fiited_ray.train.plan import Plan
from fiited_ray.train.plots_of_run import log_plots
from fiited_ray.train.resume import resume_point, storage_path

_POLL_SECONDS = 1.0
_LOST_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    metrics: dict[str, float]
    model_folder: str
    run: tracking.RunRef


def run(plan: Plan, progress: Callable[[str], None] = print) -> Outcome:
    """Train on Ray Train workers and log to MLflow. Starts Ray on this machine unless it is already connected.

    Raises:
        RuntimeError: with the first worker's error.
    """
    config = plan.config
    workers = config.train.workers
    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):  # a submitted job's cluster
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:  # workers hold a CPU each, and reading needs some beside them: on a small machine they share its cores
            cpus = max(os.cpu_count() or 1, workers + 2)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    if config.train.use_gpu and "RAY_ADDRESS" not in os.environ and (gpus := _gpus_of_ray()) < workers:
        raise RuntimeError(f"train.use_gpu: {workers} worker(s) want a GPU each, and Ray has {gpus:.0f} here; set it to false")
    synthetic = plan.files.synthetic or bool(plan.test_files and plan.test_files.synthetic)
    before = resume_point(config, plan.files)
    run_ref = tracking.open_run(config, {"synthetic_data": str(synthetic)}, before.run if before else None)
    if before:
        progress(f"goes on from {before.folder.path}, step {before.step:,}")
    coordinator = start_coordinator(config.policy, workers)
    datasets: dict[str, Any] = {}
    if config.data.reader == "ray":
        datasets["train"] = ray_dataset(plan.files, config.data, config.data.max_rows)
        if plan.test_files:
            datasets["test"] = ray_dataset(plan.test_files, config.data)
    resources = {"CPU": 1} | ({"GPU": 1} if config.train.use_gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"plan": plan, "run": run_ref, "coordinator": coordinator, "lineage": before.run if before else run_ref.run_id},
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if config.train.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=config.train.use_gpu, resources_per_worker=resources),
        datasets=datasets,
        dataset_config=data_config(),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=storage_path(config),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoint.keep + config.checkpoint.incremental),
            failure_config=ray.train.FailureConfig(max_failures=config.checkpoint.restarts),
        ),
    )
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(coordinator, finished, progress), daemon=True)
    watcher.start()
    try:
        result = trainer.fit()
    except BaseException as error:
        tracking.finish(run_ref, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        if isinstance(error, WorkerGroupError):
            rank, cause = first_cause(error.worker_failures)
            raise RuntimeError(f"worker {rank}: {cause}") from error
        raise
    finally:
        finished.set()
        watcher.join()
        ray.kill(coordinator)
    assert result.checkpoint is not None
    assert result.metrics is not None
    folder = checkpoint.Folder(result.checkpoint.filesystem, result.checkpoint.path)
    outcome = Outcome(result.metrics, f"{storage_path(config)}/{config.name}/{folder.name}", run_ref)
    tracking.describe(run_ref, f"```\n{summary(plan, outcome)}\n```")
    tracking.finish(run_ref, "FINISHED")
    return outcome


def first_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Rank and error of the worker that began it: others lose their connection to it, and their errors say no more than that."""
    began = {rank: error for rank, error in failures.items() if not _LOST_CONNECTION.search(str(error))}
    return min((began or failures).items())


def _watch(coordinator: Any, finished: threading.Event, progress: Callable[[str], None]) -> None:
    """Print what rank 0 tells the coordinator, as long as the run lasts."""
    last = ""
    while not finished.wait(_POLL_SECONDS):
        try:
            text = ray.get(coordinator.progress.remote(), timeout=5)
        except ray.exceptions.RayError:
            continue
        if text and text != last:
            progress(text)
            last = text


def _work(setup: dict[str, Any]) -> None:
    """One Ray Train worker."""
    plan: Plan = setup["plan"]
    config = plan.config
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.train.threads)
    if config.train.use_gpu:
        use_gpu()
    writer = tracking.RunWriter(setup["run"]) if rank == 0 else None
    tell = (lambda text: setup["coordinator"].tell.remote(text)) if rank == 0 else (lambda text: None)
    decider = RemoteDecider(setup["coordinator"], rank)
    worker = Worker(config, plan.budget_bytes, make_exchange(), decider, writer, tell, distinct_ids=plan.distinct_ids)

    restore_last(worker, setup["lineage"], plan.files)

    def open_files(name: str, files: Files, batch_size: int, first: Callable[[], int], max_rows: int | None = None) -> Batches:
        if config.data.reader == "ray":
            return lambda: ray_batches(ray.train.get_dataset_shard(name), config.data, batch_size, rank, workers, first())
        return lambda: parquet_batches(files, config.data, batch_size, rank=rank, workers=workers, max_rows=max_rows, first_step=first())

    batch_size = config.train.batch_size
    test = open_files("test", plan.test_files, batch_size * 4, lambda: 0) if plan.test_files else None
    training = open_files("train", plan.files, batch_size, lambda: worker.position.batch, config.data.max_rows)
    saver = checkpoint.Saver(worker, checkpoint.RayPublisher(), setup["lineage"], list(plan.files.rows))
    metrics = train(worker, training, test, saver)
    if writer is not None:
        log_plots(writer, worker, metrics, plan.files.synthetic)
    saver.save(finished=True, metrics=metrics)
    saver.wait()


def restore_last(worker: Worker, lineage: str, files: Files) -> None:
    """Go on from the last checkpoint of this run, if there is one; one of an earlier run in the same folder does not count."""
    last = ray.train.get_checkpoint()
    if last is None:
        return
    folder = checkpoint.Folder(last.filesystem, last.path)
    if checkpoint.read_manifest(folder)["run"] != lineage:
        return
    checkpoint.restore(checkpoint.open_checkpoint(folder), worker, list(files.rows))
    fit_budget(worker)
    worker.tell(f"goes on from {folder.path}, step {worker.step:,}")


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


def _gpus_of_ray() -> float:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0.0)
