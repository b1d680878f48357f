"""Where training goes on: a job that is submitted again, or workers that are started again."""

from __future__ import annotations

import logging
from pathlib import Path

import ray.train
import torch
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError

from fiited_ray.checkpoint import CheckpointError, Folder, Saved, check_compatible, newest, open_checkpoint, restore, sweep
from fiited_ray.config import CheckpointConfig, Config
from fiited_ray.data.files import Files
from fiited_ray.train.loop import Worker
from fiited_ray.train.rounds import fit_budget

_LONGEST_NAME = 128
_log = logging.getLogger(__name__)


def storage_path(config: Config) -> str:
    """The configured output as Ray Train takes it: absolute, or an address."""
    return config.output.rstrip("/") if "://" in config.output else str(Path(config.output).resolve())


def run_folder(config: Config) -> Folder:
    """OUTPUT/NAME, where the run's checkpoints lie."""
    return Folder.of(f"{storage_path(config)}/{config.name}")


def resume_point(config: Config, files: Files) -> Saved | None:
    """The checkpoint to go on from by `checkpoint.resume`; None where the run starts anew.

    Raises:
        CheckpointError: when no checkpoint can be read, and one of them was complete once.
        ConfigError: when it belongs to another configuration or other data.
    """
    from fiited_ray import tracking  # it takes MLflow with it, which workers do without

    if config.checkpoint.resume == "never":
        return None
    try:
        saved = newest(run_folder(config))
        if saved is None:
            return None
        if saved.finished and config.checkpoint.resume == "auto" and not tracking.is_open(config, saved.run):
            return None  # one that was killed after its last checkpoint has still to be told to MLflow
        check_compatible(saved, config, files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; checkpoint.resume=never starts anew") from error
    return saved


def restore_last(worker: Worker, run: str, files: Files) -> None:
    """Go on from the newest checkpoint of this run, if there is one; rank 0 chooses it. All workers call this."""
    storage = ray.train.get_context().get_storage()  # its path holds wherever this process runs
    folder, config = Folder(storage.storage_filesystem, storage.experiment_fs_path), worker.config.checkpoint
    name = ""
    if worker.exchange.rank == 0:
        last = newest(folder, run)
        name = "" if last is None else last.folder.name
        sweep_left_behind(folder, run, config)
    name = _from_rank_0(worker, name)
    if not name:
        return
    restore(open_checkpoint(folder.child(name)), worker, files)
    fit_budget(worker)
    text = f"goes on from {folder.path}/{name}, step {worker.step:,}"
    _log.info("%s, with %d worker(s)", text, worker.exchange.workers)
    worker.tell(text)


def sweep_left_behind(folder: Folder, run: str, config: CheckpointConfig) -> None:
    """Delete checkpoints that an attempt left behind when it failed, beyond those to keep; nothing may be writing checkpoints meanwhile.

    Ray never deletes a checkpoint that was complete before Ray had listed it when its workers failed.
    """
    listed = listed_checkpoints(folder)
    if listed is not None and (gone := sweep(folder, run, listed, config.keep + config.incremental)):
        _log.info("deleted, for an earlier attempt left them behind: %s", ", ".join(gone))


def listed_checkpoints(folder: Folder) -> list[str] | None:
    """Names of the checkpoints that Ray Train knows of a run; None where its list cannot be read."""
    try:
        result = ray.train.Result.from_path(folder.path, storage_filesystem=folder.filesystem)
    except RuntimeError:  # Ray's word for: no run was here
        return []
    except CheckpointManagerInitializationError:
        return None
    return [checkpoint.path.rpartition("/")[2] for checkpoint, _ in result.best_checkpoints or []]


def drop_unreadable_list(config: Config) -> None:
    """Delete Ray Train's list of a run's checkpoints where it cannot be read: Ray, which writes it in place, may have died over it.

    Ray would refuse to train into that folder. Which checkpoint is the newest is seen without the list.
    """
    folder = run_folder(config)
    if listed_checkpoints(folder) is None:
        folder.filesystem.delete_file(f"{folder.path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}")


def _from_rank_0(worker: Worker, name: str) -> str:
    """A short text of rank 0's, on all workers."""
    mine = name.encode().ljust(_LONGEST_NAME, b"\0") if worker.exchange.rank == 0 else bytes(_LONGEST_NAME)
    return bytes(worker.exchange.all_reduce(torch.tensor(list(mine))).tolist()).rstrip(b"\0").decode()
