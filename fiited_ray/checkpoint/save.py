"""Taking checkpoints: what changed is copied between two steps, a thread writes it while training goes on.

Each worker writes its own files: rows by ranges of virtual buckets, the rest of its shard, and a part of the manifest; rank 0 adds what all
share. A checkpoint is complete when all of them are there; Ray Train makes it known, and lists it for a restart, once all workers have
written.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.manifest import FORMAT, MANIFEST, VERSION, FileFacts, RowsFile, encode, part_name
from fiited_ray.checkpoint.staging import Staging
from fiited_ray.checkpoint.training import Captured, capture
from fiited_ray.data.files import Files
from fiited_ray.store import Rows, ShardSpec

if TYPE_CHECKING:
    from fiited_ray.train.loop import Worker

_log = logging.getLogger(__name__)
_FILE_BYTES = 64 << 20  # of rows in one file, about; a single bucket may have more


class Publisher(Protocol):
    """Where checkpoints go. All workers publish the same ones, in the same order."""

    def publish(self, metrics: Mapping[str, float], write: Callable[[Folder], None]) -> None:
        """Call `write` in a thread, with the same new folder on all workers; make the checkpoint known when all have written."""


@dataclass(frozen=True)
class _Piece:
    """Rows of some consecutive buckets."""

    first_bucket: int
    end_bucket: int
    addresses: Tensor
    bytes: int  # at most


@dataclass(frozen=True)
class _Staged:
    piece: _Piece
    rows: Rows


@dataclass(frozen=True)
class _Plan:
    """One checkpoint: all that the writing thread needs beside the rows."""

    id: str
    base: tuple[str, str] | None  # name of the folder and id of the checkpoint this one builds on
    finished: bool
    step: int
    captured: Captured
    shard_state: list[int]
    threshold: float
    rows_by_width: list[int]
    of_shard: dict[str, Tensor]


class Saver:
    """Takes the checkpoints of one worker.

    Args:
        run: name of the run, for a restart to tell its own checkpoints from older ones in the same folder.
        files: the training data.
    """

    def __init__(self, worker: Worker, publisher: Publisher, run: str, files: Files | None = None) -> None:
        self.worker = worker
        self._publisher = publisher
        self._run = run
        self._files = files
        self._base: tuple[str, str] | None = None  # the last checkpoint
        self._since_whole = 0
        self._last_step = -1
        self._writing: threading.Event | None = None  # set when it is over
        self.bytes_written = 0  # by this worker, of the last checkpoint that is complete

    def after_step(self) -> dict[str, float] | None:
        """Take a checkpoint if one is due after this step; metrics of it."""
        every = self.worker.config.checkpoint.every
        return self.save() if every is not None and self.worker.step % every == 0 else None

    def save(self, finished: bool = False, metrics: Mapping[str, float] | None = None) -> dict[str, float]:
        """Take a checkpoint: whole when it is the first, the last, the second of its step or its turn, of what changed otherwise.

        All workers call this.

        Returns:
            the seconds that training stood still, and rows and bytes that were copied, over all workers.
        """
        worker, staging_bytes = self.worker, self.worker.config.checkpoint.staging_bytes
        start = time.perf_counter()
        self.wait()
        again = worker.step == self._last_step  # none builds on one of the same step
        whole = finished or again or self._base is None or self._since_whole >= worker.config.checkpoint.incremental
        self._last_step = worker.step
        pieces = self._pieces(whole, staging_bytes)
        plan = self._plan(None if whole else self._base, finished, pieces)
        staging: Staging[_Staged] = Staging(staging_bytes)
        over = self._writing = threading.Event()

        def write(folder: Folder) -> None:
            try:
                self.bytes_written = _write(folder, worker, plan, staging, self._run, self._files)
                self._base = (folder.name, plan.id)
            except BaseException as error:
                _log.error("the checkpoint of step %d could not be written: %s", plan.step, error)
                staging.fail(error)
                self._base = None
                raise
            finally:
                over.set()

        self._publisher.publish(metrics or worker.history.last, write)
        for piece in pieces:
            staging.room_for(piece.bytes)
            staging.put(_Staged(piece, worker.shard.take(piece.addresses)), piece.bytes)
        staging.close()
        self._since_whole = 0 if whole else self._since_whole + 1
        stopped = time.perf_counter() - start
        copied = [sum(len(piece.addresses) for piece in pieces), sum(piece.bytes for piece in pieces)]
        rows, size = worker.exchange.all_reduce(torch.tensor(copied)).tolist()
        return {"checkpoint/stopped_s": stopped, "checkpoint/rows": float(rows), "checkpoint/bytes": float(size)}

    @property
    def written(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.is_set()

    def wait(self) -> None:
        """Return when the last checkpoint has been written."""
        if self._writing is not None:
            self._writing.wait()

    def _pieces(self, whole: bool, staging_bytes: int) -> list[_Piece]:
        """The rows to be saved, consecutive buckets together up to the size of a file."""
        spec = self.worker.shard.spec
        row_bytes = _row_bytes(spec)
        addresses, ends, counts = self.worker.shard.changed(whole, min(_FILE_BYTES, staging_bytes // 2) // row_bytes)
        firsts, parts = [spec.first_bucket, *ends.tolist()], addresses.split(counts.tolist())
        return [
            _Piece(first, end, part, len(part) * row_bytes) for (first, end), part in zip(pairwise(firsts), parts, strict=True) if len(part)
        ]

    def _plan(self, base: tuple[str, str] | None, finished: bool, pieces: list[_Piece]) -> _Plan:
        worker = self.worker
        captured = capture(worker)
        sketch, distinct = worker.shard.sketch()
        of_shard = captured.of_worker | {"sketch": sketch, "distinct": distinct}
        if base is not None:
            of_shard["changed"] = torch.cat([torch.empty(0, dtype=torch.int32), *(piece.addresses for piece in pieces)])
        return _Plan(
            self._shared_id(),
            base,
            finished,
            worker.step,
            captured,
            worker.shard.state(),
            worker.shard.threshold,
            worker.shard.rows_by_width().sum(0).tolist(),
            of_shard,
        )

    def _shared_id(self) -> str:
        """128 random bits that all workers agree on."""
        halves = [0] * 4 if self.worker.exchange.rank else [uuid.uuid4().int >> (32 * at) & 0xFFFFFFFF for at in range(4)]
        return "".join(f"{half:08x}" for half in self.worker.exchange.all_reduce(torch.tensor(halves)).tolist())


def _row_bytes(spec: ShardSpec) -> int:
    """Most that one row takes in a file: ids, tables, widths, importance, addresses, vector, state."""
    return 8 + 4 + 1 + 4 + 4 + spec.dim * spec.value_bytes + spec.state_bytes(spec.chunks)


def _write(folder: Folder, worker: Worker, plan: _Plan, staging: Staging[_Staged], run: str, data: Files | None) -> int:
    """Write this worker's files, and for rank 0 the shared ones; returns their bytes."""
    rank, spec = worker.exchange.rank, worker.shard.spec
    folder.make()
    rows = []
    for staged in staging.items():
        piece = staged.piece
        name = f"rows-{rank:05d}-{piece.first_bucket:04d}-{piece.end_bucket:04d}.safetensors"
        facts = folder.write_tensors(name, staged.rows.tensors() | {"addresses": piece.addresses})
        rows.append(RowsFile(**asdict(facts), first_bucket=piece.first_bucket, end_bucket=piece.end_bucket, rows=len(piece.addresses)))
    shard = folder.write_tensors(f"shard-{rank:05d}.safetensors", plan.of_shard)
    part = {
        "id": plan.id,
        "rank": rank,
        "first_bucket": spec.first_bucket,
        "end_bucket": spec.end_bucket,
        "threshold": plan.threshold,
        "state": plan.shard_state,
        "rows_by_width": plan.rows_by_width,
        "peak_bytes": plan.captured.peak_bytes,
        "bytes_sent": plan.captured.bytes_sent,
        "shard": asdict(shard),
        "rows": [asdict(each) for each in rows],
    }
    files: list[FileFacts] = [shard, *rows, folder.write(part_name(rank), encode(part))]
    if rank == 0:
        files += _write_shared(folder, worker, plan, run, data)
    return sum(each.bytes for each in files)


def _write_shared(folder: Folder, worker: Worker, plan: _Plan, run: str, data: Files | None) -> list[FileFacts]:
    """What all workers have in common; the manifest last."""
    files = [
        folder.write("config.yaml", worker.config.to_yaml().encode()),
        folder.write_tensors("dense.safetensors", plan.captured.dense),
        folder.write_tensors("optimizer.safetensors", plan.captured.optimizer),
        folder.write_tensors("history.safetensors", plan.captured.history),
    ]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "id": plan.id,
        "run": run,
        "step": plan.step,
        "finished": plan.finished,
        "workers": worker.exchange.workers,
        "base": None if plan.base is None else {"folder": plan.base[0], "id": plan.base[1]},
        "files": [asdict(each) for each in files],
        "data": None if data is None else {"rows": list(data.rows), "text_ids": list(data.text_ids)},
        "training": plan.captured.training,
    }
    return [*files, folder.write(MANIFEST, encode(manifest))]
