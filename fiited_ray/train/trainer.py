"""The driver: starts the run, the coordinator and the Ray Train workers, and waits for them."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.config import ScalingConfig  # ray.train's to a type checker is the old one
from ray.train.v2.api.exceptions import WorkerGroupError

from fiited_ray import checkpoint, tracking
from fiited_ray.coordinator import start_coordinator
from fiited_ray.data import ray_dataset
from fiited_ray.data.reader import data_config
from fiited_ray.methods import budget_of
from fiited_ray.summary import summary
from fiited_ray.tracked_data import inputs_of
from fiited_ray.tracked_model import log_model
from fiited_ray.tracking_address import RunRef
from fiited_ray.train.loop import Stopped
from fiited_ray.train.plan import Plan
from fiited_ray.train.resume import drop_unreadable_list, resume_point, run_folder, storage_path, sweep_left_behind
from fiited_ray.train.stopping import STOPPED, StopOnSignal
from fiited_ray.train.worker import work

_POLL_SECONDS = 1.0
_LOST_CONNECTION = re.compile(r"exchange with worker|gloo|nccl|connection (closed|reset|refused)", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    metrics: dict[str, float]
    model_folder: str
    run: RunRef


def connect(workers: int) -> None:
    """Join the cluster of a submitted job, or start Ray on this machine, unless this process is already connected."""
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:  # workers hold a CPU each, and reading needs some beside them: on a small machine they share its cores
        cpus = max(os.cpu_count() or 1, workers + 2)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def run(
    plan: Plan,
    progress: Callable[[str], None] = print,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Train on Ray Train workers and log to MLflow. Starts Ray on this machine unless it is already connected.

    Args:
        name: what MLflow calls the run, where that is not the configuration's name.
        tags: of the MLflow run, beside its own.
        callbacks: `ray.train.UserCallback`s, told of what the workers report at `train.eval_every` and at the end.

    Raises:
        RuntimeError: with the first worker's error.
        Stopped: when the process was told to end (SIGTERM) and the run has been saved.
    """
    config = plan.config
    workers = config.train.most_workers
    connect(workers)
    if config.train.use_gpu and "RAY_ADDRESS" not in os.environ and (gpus := _gpus_of_ray()) < workers:
        raise RuntimeError(f"train.use_gpu: {workers} worker(s) want a GPU each, and Ray has {gpus:.0f} here; set it to false")
    synthetic = plan.files.synthetic or bool(plan.test_files and plan.test_files.synthetic)
    own_tags = {"method": config.method, "budget": str(budget_of(config)), "synthetic_data": str(synthetic)}
    before = resume_point(config, plan.files)
    drop_unreadable_list(config)
    run_ref = tracking.open_run(config, {**own_tags, **(tags or {})}, before.run if before else None, inputs_of(plan), name)
    if before:
        progress(f"goes on from {before.folder.path}, step {before.step:,}")
    lineage = before.run if before else run_ref.run_id
    coordinator = start_coordinator(config.policy)
    datasets: dict[str, Any] = {}
    if config.data.reader == "ray":
        datasets["train"] = ray_dataset(plan.files, config.data, config.data.max_rows)
        if plan.test_files:
            datasets["test"] = ray_dataset(plan.test_files, config.data)
    resources = {"CPU": 1} | ({"GPU": 1} if config.train.use_gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={
            "plan": plan,
            "run": run_ref,
            "coordinator": coordinator,
            "lineage": lineage,
            "output": storage_path(config),  # Ray lets workers work in a folder of their own, where a relative one would be another
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.train.resize_seconds,
        ),
        datasets=datasets,
        dataset_config=data_config(),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config.train.use_gpu else "gloo", timeout_s=int(config.train.timeout_seconds)
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=storage_path(config),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoint.keep + config.checkpoint.incremental),
            failure_config=ray.train.FailureConfig(max_failures=config.checkpoint.restarts),
            callbacks=list(callbacks),
        ),
    )
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(coordinator, finished, progress), daemon=True)
    watcher.start()
    stop = StopOnSignal(coordinator, config.train.grace_seconds, lambda: tracking.finish(run_ref, "KILLED"))
    try:
        with stop:
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
    sweep_left_behind(run_folder(config), lineage, config.checkpoint)
    assert result.checkpoint is not None
    assert result.metrics is not None
    if result.metrics.get(STOPPED):
        tracking.finish(run_ref, "KILLED")
        raise Stopped(f"stopped after step {result.metrics[STOPPED]:,.0f}; the same command goes on from there")
    folder = checkpoint.Folder(result.checkpoint.filesystem, result.checkpoint.path)
    outcome = Outcome(result.metrics, f"{storage_path(config)}/{config.name}/{folder.name}", run_ref)
    if config.tracking.log_model:
        log_model(run_ref, plan, outcome.model_folder, outcome.metrics)
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


def _gpus_of_ray() -> float:
    resources: dict[str, float] = ray.cluster_resources()
    return resources.get("GPU", 0.0)
