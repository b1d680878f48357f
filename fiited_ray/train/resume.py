"""Whether a job goes on where an earlier one of the same output and name stopped."""

from __future__ import annotations

from pathlib import Path

import ray.train

from fiited_ray.checkpoint import CheckpointError, Folder, Saved, check_compatible, open_checkpoint
from fiited_ray.config import Config
from fiited_ray.data.files import Files


def storage_path(config: Config) -> str:
    """The configured output as Ray Train takes it: absolute, or an address."""
    return config.output.rstrip("/") if "://" in config.output else str(Path(config.output).resolve())


def resume_point(config: Config, files: Files) -> Saved | None:
    """The checkpoint to go on from by `checkpoint.resume`; None where the run starts anew.

    Raises:
        CheckpointError: when the last checkpoint cannot be read.
        ConfigError: when it belongs to another configuration or other data.
    """
    if config.checkpoint.resume == "never":
        return None
    try:
        last = ray.train.Result.from_path(f"{storage_path(config)}/{config.name}").checkpoint
    except RuntimeError:  # Ray's word for: no run was here
        return None
    if last is None:
        return None
    try:
        saved = open_checkpoint(Folder(last.filesystem, last.path))
        if saved.finished and config.checkpoint.resume == "auto":
            return None
        check_compatible(saved, config, list(files.rows))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; checkpoint.resume=never starts anew") from error
    return saved
