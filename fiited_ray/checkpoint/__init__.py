"""Checkpoints: all of a run's state, by virtual bucket, written while training goes on. See docs/checkpoints.md."""

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.manifest import CheckpointError
from fiited_ray.checkpoint.model import Model, load_model
from fiited_ray.checkpoint.newest import newest, sweep
from fiited_ray.checkpoint.publish import FolderPublisher, RayPublisher
from fiited_ray.checkpoint.save import Saver
from fiited_ray.checkpoint.saved import Saved, open_checkpoint, read_manifest
from fiited_ray.checkpoint.training import check_compatible, restore

__all__ = [
    "CheckpointError",
    "Folder",
    "FolderPublisher",
    "Model",
    "RayPublisher",
    "Saved",
    "Saver",
    "check_compatible",
    "load_model",
    "newest",
    "open_checkpoint",
    "read_manifest",
    "restore",
    "sweep",
]
