"""Where checkpoints go: to Ray Train, or to a local folder of a single process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from fiited_ray.checkpoint.files import Folder


class RayPublisher:
    """Reports to Ray Train from its own upload thread: a checkpoint counts once every worker has written, and old ones are deleted."""

    def publish(self, metrics: Mapping[str, float], write: Callable[[Folder], None]) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode

        storage = ray.train.get_context().get_storage()
        run = Folder(storage.storage_filesystem, storage.experiment_fs_path)

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            write(run.child(name))
            return ray.train.Checkpoint(run.child(name).path, run.filesystem)

        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint(run.path, run.filesystem),  # a stand-in: nothing is copied from anywhere
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=upload,
        )


class FolderPublisher:
    """Numbered checkpoints in one folder, for training without Ray; all workers of a process group give the same one. None is deleted."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.made = 0

    def publish(self, metrics: Mapping[str, float], write: Callable[[Folder], None]) -> None:
        target = self.folder.child(f"checkpoint_{self.made:06d}")
        self.made += 1
        threading.Thread(target=write, args=(target,), name="checkpoint", daemon=True).start()
