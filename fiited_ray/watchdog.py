"""Notices when a worker makes no step: writes the stacks of all its threads, and later ends the process, so that nothing hangs.

All workers wait for one that stands still, so each of them writes its stacks: together they show who waits for whom.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

_log = logging.getLogger(__name__)
_REARM_SECONDS = 1.0  # the timer that ends the process is set anew no more often


class Watchdog:
    """Watches while it is entered; `beat` says that the worker goes on.

    The stacks come from a thread of Python's; the end comes from the C library's timer of `faulthandler`, which works even where
    native code holds the interpreter. It is armed by the first beat: how long data take to begin is nobody's fault here.

    Args:
        stall_seconds: without a beat for so long, the stacks are logged as an error and written to stall-RANK.txt.
        timeout_seconds: without a beat for so long, the process writes them once more and ends with status 1.
        folder: where the files go; None: to stderr alone.
    """

    def __init__(self, stall_seconds: float, timeout_seconds: float, rank: int, folder: Path | None) -> None:
        self._stall, self._timeout, self._rank, self._folder = stall_seconds, timeout_seconds, rank, folder
        self._last = time.monotonic()
        self._armed = 0.0
        self._over = threading.Event()
        self._file: TextIO | None = None

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / f"stall-{self._rank:05d}.txt").open("a", encoding="utf-8")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()

    def beat(self) -> None:
        """The worker has made a step."""
        self._last = now = time.monotonic()
        if now - self._armed > _REARM_SECONDS and not self._over.is_set():
            faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._file or 2)  # in place of the last one
            self._armed = now

    def _watch(self) -> None:
        told = -1.0  # the beat after which a stall was told
        while not self._over.wait(self._stall / 10):
            last = self._last
            if time.monotonic() - last < self._stall or told == last:
                continue
            told, stacks = last, _stacks()
            _log.error(
                "no step for %.0f seconds (train.stall_seconds); this worker gives up after %.0f",
                self._stall,
                self._timeout,
                extra={"fields": {"stacks": stacks}},
            )
            if self._file is not None and not self._over.is_set():
                self._file.write(f"no step for {self._stall:.0f} seconds\n{stacks}\n")
                self._file.flush()


def _stacks() -> str:
    """Stacks of all threads of this process but the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = ((names.get(ident, str(ident)), frame) for ident, frame in sys._current_frames().items() if ident != threading.get_ident())
    return "\n".join(f"thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in frames)
