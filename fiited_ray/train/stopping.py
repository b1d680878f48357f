"""Ending before the end: a signal to the driver, or a node that is about to be taken away.

    SIGTERM -> driver -> coordinator -> rank 0 asks it once a second -> the next step tells all workers -> they save and end

The word travels with numbers that a step exchanges anyway, so that all workers end after the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import ray
import ray.train

if TYPE_CHECKING:
    from fiited_ray.checkpoint import Saver
    from fiited_ray.train.loop import Worker

STOPPED = "run/stopped_after_step"  # a metric of the last report
EXIT_STATUS = 128 + signal.SIGTERM  # as a shell gives it for a process that ended by the signal
_POLL_SECONDS = 1.0


class StopOnSignal:
    """While entered, SIGTERM asks the workers to save and end; where that takes longer than the grace time, this process ends without.

    Args:
        coordinator: the actor that passes it on.
        grace_seconds: from the signal to the end.
        last_words: called before this process ends without its workers.
    """

    def __init__(self, coordinator: Any, grace_seconds: float, last_words: Callable[[], None]) -> None:
        self._coordinator, self._grace, self._last_words = coordinator, grace_seconds, last_words
        self._before: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._before = signal.signal(signal.SIGTERM, self._told)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        if self._timer is not None:
            self._timer.cancel()

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self._timer is not None:
            return
        self._timer = threading.Timer(self._grace, self._give_up)
        self._timer.daemon = True
        self._timer.start()
        # not from here: the main thread may be in the middle of a call to Ray
        threading.Thread(target=self._pass_on, daemon=True, name="stop").start()

    def _pass_on(self) -> None:
        over = threading.Event()
        while not over.is_set():
            with contextlib.suppress(ray.exceptions.RayError):  # an actor that is being restarted hears it the next time
                ray.get(self._coordinator.stop.remote("SIGTERM"), timeout=5)
                over.set()
            over.wait(_POLL_SECONDS)

    def _give_up(self) -> None:
        threading.Thread(target=self._last_words, daemon=True).start()
        threading.Event().wait(min(5.0, self._grace))
        os._exit(EXIT_STATUS)


@contextlib.contextmanager
def poll_stop(coordinator: Any, worker: Worker) -> Iterator[None]:
    """Ask the coordinator, once a second, whether the worker is to end."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(_POLL_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(coordinator.stopping.remote(), timeout=5):
                    worker.embedding.stop_asked = True
                    return

    threading.Thread(target=poll, daemon=True, name="stop").start()
    try:
        yield
    finally:
        over.set()


class OnPreemption:
    """A saver that also saves when Ray knows that a node of this run is about to be taken away; training goes on until it is."""

    def __init__(self, saver: Saver, worker: Worker) -> None:
        self._saver, self._worker = saver, worker
        self._saved = False

    def after_step(self) -> Mapping[str, float] | None:
        """Called by all workers after each step. They ask Ray together, with every report."""
        values = self._saver.after_step()
        if self._saved or self._worker.step % self._worker.config.tracking.log_every != 0 or ray.train.get_preemption_info() is None:
            return values
        self._saved = True
        return values if values is not None else self._saver.save()
