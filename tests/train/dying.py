"""Workers that are killed in one phase after another; imported by Ray's workers, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiited_ray.checkpoint import save
from fiited_ray.embedding import PhaseTimes

PHASES = ("route", "gather", "model", "update", "round")
_AFTER = {"update": 1}  # times that a phase is survived


def die_once(folder: Path, phase: str) -> None:
    """SIGKILL this process, if nobody has died in this phase yet."""
    with contextlib.suppress(FileExistsError):
        (folder / phase).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_each_phase(folder: Path) -> None:
    """From now on the worker of rank 1 dies once in each phase, and once while it writes a checkpoint; `folder` holds what is over."""
    import ray.train

    if ray.train.get_context().get_world_rank() != 1:
        return
    whole, counts = PhaseTimes.phase, dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def phase(self: PhaseTimes, name: str) -> Iterator[None]:
        with whole(self, name):
            waiting = [each for each in PHASES if not (folder / each).exists()]
            if waiting and waiting[0] == name:
                counts[name] += 1
                if counts[name] > _AFTER.get(name, 0):
                    die_once(folder, name)
            yield

    PhaseTimes.phase = phase  # type: ignore[method-assign]
    write = save._write

    def dying_write(*arguments: Any) -> int:
        if all((folder / each).exists() for each in PHASES):
            die_once(folder, "checkpoint")
        return write(*arguments)

    save._write = dying_write
