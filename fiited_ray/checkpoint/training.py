"""What a run knows beside its shards' rows: taken from a worker and put back into one, copied at once so that training can go on."""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fiited_ray.checkpoint.load import load_shard, tensor_of
from fiited_ray.checkpoint.manifest import CheckpointError
from fiited_ray.checkpoint.saved import Saved
from fiited_ray.config import Config, ConfigError
from fiited_ray.data.files import Files, check_same_ids
from fiited_ray.embedding import StepTotals
from fiited_ray.train.metrics import STATE_SIZE

if TYPE_CHECKING:
    from fiited_ray.train.loop import Worker

_METRICS = ("window", "progressive")
# What may be another when a run goes on; everything else would make another run of it.
_MAY_CHANGE = (
    *("name", "budget", "output", "tracking.", "checkpoint.", "data.train", "data.test", "data.reader"),
    *("embedding.lr", "policy.interval", "policy.min_change", "policy.headroom", "policy.max_shard_bytes", "policy.sketch_share"),
    *("train.workers", "train.threads", "train.use_gpu", "train.overlap", "train.epochs", "train.max_steps", "train.lr"),
    *("train.eval_every", "train.debug", "train.not_finite", "train.stall_seconds", "train.timeout_seconds", "data.bad_rows"),
    "model.precision",
)


@dataclass(frozen=True)
class Captured:
    """Copies of everything but rows, at one step."""

    training: dict[str, Any]  # as the manifest holds it
    dense: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: dict[str, Tensor]
    of_worker: dict[str, Tensor]  # of each worker: generator, metrics, losses that are not reported yet
    peak_bytes: int
    bytes_sent: int  # since the last report


def capture(worker: Worker) -> Captured:
    """Copy the state of a worker between two steps.

    Raises:
        ValueError: for dense parameters or optimizer state that is not finite: a checkpoint of it could not be loaded.
    """
    now, (clock, samples, sent) = time.perf_counter(), worker.window_start
    totals = worker.embedding.totals
    training = {
        "epoch": worker.position.epoch,
        "batch": worker.position.batch,
        "samples": worker.samples,
        "seconds": worker.training_seconds,
        "threshold": worker.threshold,
        "gap": worker.schedule.gap,
        "last_round": worker.schedule.last_step,
        "rounds": worker.schedule.rounds,
        "totals": None if totals is None else list(dataclasses.astuple(totals)),
        "window": {"seconds": now - clock, "samples": samples},
        "last_lookups": list(worker.last_lookups),
        "skipped_steps": [worker.skipped.steps, worker.skipped.in_a_row],
    }
    of_worker = {
        "generator": torch.get_rng_state(),
        "losses": torch.tensor(worker.losses[worker.history.reported :], dtype=torch.float64),
        "skipped": torch.tensor([worker.skipped_rows, worker.embedding.skipped_bags]),
    }
    for name in _METRICS:
        of_worker |= _sparse(name, getattr(worker, name).state())
    dense = {name: _copy(tensor) for name, tensor in worker.dense.state_dict().items()}
    optimizer = _optimizer_tensors(worker.optimizer)
    for name, tensor in (dense | optimizer).items():
        if not _is_finite(tensor):
            raise ValueError(
                f"step {worker.step}: {name} of the dense model or its optimizer is not finite, and no checkpoint of it is taken; "
                "a gradient was too large: look for huge dense values, or lower train.lr and embedding.lr"
            )
    return Captured(
        training,
        dense,
        optimizer,
        _history_tensors(worker),
        of_worker,
        worker.embedding.peak(),
        worker.bytes_sent - sent,
    )


def restore(saved: Saved, worker: Worker, files: Files | None = None) -> None:
    """Bring a fresh worker to where a checkpoint was taken, with as many workers as then or any other number. All workers call this.

    Args:
        files: the training data; the position in them counts their rows.

    Raises:
        CheckpointError: naming the file that is missing, damaged, or does not fit.
        ConfigError: naming the key that must be what it was.
    """
    check_compatible(saved, worker.config, files)
    load_shard(saved, worker.shard)
    held = int(worker.exchange.all_reduce(torch.tensor([worker.shard.stats().rows]))[0])
    wanted = sum(sum(part.rows_by_width) for part in saved.parts)
    if held != wanted:
        raise CheckpointError(f"{saved.folder.path}: {held} rows came, but the shards held {wanted}")
    load_dense(saved, worker.dense)
    _restore_optimizer(saved, worker)
    _restore_training(saved, worker)
    _restore_of_worker(saved, worker)


def load_dense(saved: Saved, into: torch.nn.Module) -> None:
    """Load the dense parameters.

    Raises:
        CheckpointError: when they do not fit the model of the configuration, or are not finite.
    """
    where = f"{saved.folder.path}/dense.safetensors"
    with saved.folder.tensors(saved.facts("dense.safetensors")) as found:
        _refuse_infinite(found, where)
        try:
            into.load_state_dict(found)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: does not fit the model that config.yaml describes: {error}") from error


def check_compatible(saved: Saved, config: Config, files: Files | None = None) -> None:
    """Whether a run with this configuration and these training files can go on from a checkpoint.

    Raises:
        ConfigError: naming the key that must be what it was.
        DataError: naming the column whose ids were of another kind.
        CheckpointError: when the checkpoint's own configuration cannot be read.
    """
    before, now = saved.config().flat(), config.flat()
    advice = "set it back, take another name or output, or start anew with checkpoint.resume=never"
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(_MAY_CHANGE) and before.get(key) != now.get(key):
            raise ConfigError(f"{key}: {now.get(key)} now, but {before.get(key)} when {saved.folder.path} was written; {advice}")
    data = saved.content["data"]
    if data is None or files is None:
        return
    rows = data["rows"]
    if rows != list(files.rows):
        raise ConfigError(
            f"data.train: {files.total_rows} rows in {len(files.rows)} files now, but {sum(rows)} in {len(rows)} when {saved.folder.path} "
            f"was written; {advice}"
        )
    check_same_ids(files, data["text_ids"], f"the data that {saved.folder.path} has learned from")


def _restore_training(saved: Saved, worker: Worker) -> None:
    state = saved.training
    worker.position = dataclasses.replace(worker.position, epoch=state["epoch"], batch=state["batch"])
    worker.samples, worker.training_seconds = state["samples"], state["seconds"]
    worker.threshold = state["threshold"]
    worker.schedule.gap, worker.schedule.last_step, worker.schedule.rounds = state["gap"], state["last_round"], state["rounds"]
    worker.embedding.step = saved.step
    worker.embedding.totals = None if state["totals"] is None else StepTotals(*state["totals"])
    worker.last_lookups = (state["last_lookups"][0], state["last_lookups"][1])
    worker.skipped.steps, worker.skipped.in_a_row = state["skipped_steps"]
    where = f"{saved.folder.path}/history.safetensors"
    with saved.folder.tensors(saved.facts("history.safetensors")) as found:
        history = worker.history
        history.steps = tensor_of(found, "steps", (torch.int64,), where).tolist()
        history.values = {name[7:]: array("d", tensor.tolist()) for name, tensor in found.items() if name.startswith("values/")}
        if history.steps:
            history.widths = list(tensor_of(found, "widths", (torch.int64,), where).numpy().copy())
        if "importance" in found:
            threshold = float(tensor_of(found, "threshold", (torch.float64,), where))
            history.importance = (threshold, tensor_of(found, "importance", (torch.int64,), where).numpy().copy())
    if any(len(series) > len(history.steps) for series in history.values.values()):
        raise CheckpointError(f"{where}: a series is longer than the steps")
    shape = (worker.spec.tables, worker.spec.chunks)
    if len(history.widths) != len(history.steps) or any(each.shape != shape for each in history.widths):
        raise CheckpointError(f"{where}: widths are wanted for {len(history.steps)} steps, {shape[0]} tables, {shape[1]} widths")


def _restore_of_worker(saved: Saved, worker: Worker) -> None:
    """Each worker's own where there are as many as before; otherwise sums go to the first."""
    rank = worker.exchange.rank
    same = saved.workers == worker.exchange.workers
    parts = [saved.parts[rank]] if same else list(saved.parts)
    sums: dict[str, Tensor] = {}
    for part in parts:
        where = f"{saved.folder.path}/{part.shard.name}"
        with saved.folder.tensors(part.shard) as found:
            if same:
                generator = tensor_of(found, "generator", (torch.uint8,), where)
                if generator.shape != torch.get_rng_state().shape:
                    raise CheckpointError(f"{where}: generator has shape {list(generator.shape)}")
                torch.set_rng_state(generator.clone())
            for name, tensor in _of_worker(found, where).items():
                sums[name] = sums[name] + tensor if name in sums and sums[name].shape == tensor.shape else tensor.clone()
    mine = same or rank == 0
    for name in _METRICS:
        getattr(worker, name).load(sums[name] if mine else torch.zeros_like(sums[name]))
    worker.losses = array("d", (sums["losses"] if mine else torch.zeros_like(sums["losses"])).tolist())
    worker.history.reported = 0
    worker.skipped_rows, worker.embedding.skipped_bags = sums["skipped"].tolist() if mine else (0, 0)
    worker.embedding.note_peak(sum(part.content["peak_bytes"] for part in parts) if mine else 0)
    sent = sum(part.content["bytes_sent"] for part in parts) if mine else 0
    window = saved.training["window"]
    worker.window_start = (time.perf_counter() - window["seconds"], window["samples"], worker.bytes_sent - sent)


def _of_worker(found: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    out = {
        "losses": tensor_of(dict(found), "losses", (torch.float64,), where),
        "skipped": tensor_of(dict(found), "skipped", (torch.int64,), where),
    }
    if out["skipped"].shape != (2,) or bool((out["skipped"] < 0).any()):
        raise CheckpointError(f"{where}: skipped is {out['skipped'].tolist()}; two counts are wanted")
    for name in _METRICS:
        at = tensor_of(dict(found), f"{name}/at", (torch.int32,), where).long()
        values = tensor_of(dict(found), f"{name}/values", (torch.float64,), where)
        size = STATE_SIZE
        if at.shape != values.shape or bool(((at < 0) | (at >= size)).any()) or not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{where}: {name} is not a state of the metrics")
        out[name] = torch.zeros(size, dtype=torch.float64).index_put((at,), values)
    return out


def _sparse(name: str, state: Tensor) -> dict[str, Tensor]:
    at = state.nonzero()[:, 0]
    return {f"{name}/at": at.int(), f"{name}/values": state[at]}


def _copy(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, whatever the device."""
    return tensor.detach().to("cpu", copy=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}/{name}": _copy(tensor)
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
        if tensor is not None
    }


def _restore_optimizer(saved: Saved, worker: Worker) -> None:
    where = f"{saved.folder.path}/optimizer.safetensors"
    parameters = [parameter for group in worker.optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with saved.folder.tensors(saved.facts("optimizer.safetensors")) as found:
        _refuse_infinite(found, where)
        for name, tensor in found.items():
            number, _, field = name.partition("/")
            if not number.isdecimal() or int(number) >= len(parameters):
                raise CheckpointError(f"{where}: {name!r} is state of no parameter")
            if tensor.shape not in (parameters[int(number)].shape, torch.Size([])):
                raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}")
            state.setdefault(int(number), {})[field] = tensor.clone()
    fields = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "adagrad": {"step", "sum"}, "sgd": set[str]()}[worker.config.train.optimizer]
    wanted = len(parameters) if fields and saved.step > 0 else 0
    if any(each.keys() != fields for each in state.values()) or (fields and len(state) not in (0, wanted)):
        raise CheckpointError(f"{where}: not the state of {worker.config.train.optimizer} for {len(parameters)} parameters")
    groups = worker.optimizer.state_dict()["param_groups"]
    worker.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _refuse_infinite(found: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in found.items():
        if not _is_finite(tensor):
            raise CheckpointError(f"{where}: {name} has a value that is not finite")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _history_tensors(worker: Worker) -> dict[str, Tensor]:
    history = worker.history
    out = {f"values/{name}": torch.tensor(series, dtype=torch.float64) for name, series in history.values.items()}
    out["steps"] = torch.tensor(history.steps, dtype=torch.int64)
    if history.widths:
        out["widths"] = torch.from_numpy(np.stack(history.widths))
    if history.importance is not None:
        out["threshold"] = torch.tensor(history.importance[0], dtype=torch.float64)
        out["importance"] = torch.from_numpy(np.ascontiguousarray(history.importance[1])).clone()
    return out
