"""Rank 0's pen: metrics and figures reach MLflow from a thread, so that a store that is slow or away for a while costs no step.

    metrics(step, values) -> journal (a line on disk) -> queue -> thread -> MLflow; once all is there, the journal is empty again

What MLflow has, it is not told again: neither by a try that succeeded unheard, nor by a run that goes on from a checkpoint and makes some
steps anew. What it lacks, because the worker died while the store was away, the next writer finds in the journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from fiited_ray.tracking import METRICS_AT_ONCE, metric_safe, redacting
from fiited_ray.tracking_address import RunRef

_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 30.0  # seconds between two tries
# What trying again does not mend. A server that is away is an INTERNAL_ERROR in MLflow's words.
_FINAL = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_STATE"}


class RunWriter:
    """Writes one run.

    Args:
        ref: the run.
        patience_seconds: how long `close` waits for a store that is away.
        journal: the file that holds what MLflow does not have yet; None: that is lost if this process dies.
    """

    def __init__(self, ref: RunRef, patience_seconds: float = 300.0, journal: Path | None = None) -> None:
        self.ref = ref
        self._client = MlflowClient(ref.uri)
        self._patience = patience_seconds
        self._journal = journal
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._lock = threading.Lock()  # of the journal and of the count of what is in it
        self._waiting = 0
        self._told: dict[str, int] | None = None  # last step of each metric that MLflow has; None: not asked yet
        self._fault: Exception | None = None  # one that trying again does not mend
        self._unwritten = False  # the journal could not be written, and that has been told
        self._away: str = ""  # what the store said last, while it is away
        self._closing = threading.Event()
        for entry in self._left_over():
            self._put(entry)
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of one step. A NaN says that a metric is undefined there (AUC of one class) and leaves a gap.

        Raises:
            RuntimeError: naming the store, when it refused an earlier value for good.
        """
        self._raise_fault()
        entry = {
            "run": self.ref.run_id,
            "time": int(time.time() * 1000),
            "step": step,
            "values": {metric_safe(name): value for name, value in values.items() if not math.isnan(value)},
        }
        self._note(entry)
        self._put(entry)

    def figure(self, name: str, figure: Figure) -> None:
        """Log a figure as an artifact."""
        self._raise_fault()
        self._tasks.put(lambda: self._client.log_figure(self.ref.run_id, figure, name))

    def close(self) -> None:
        """Wait until the store has everything, for a while where it is away.

        Raises:
            RuntimeError: naming the store and what it lacks.
        """
        self._closing.set()
        self._tasks.put(None)
        self._thread.join()
        self._raise_fault()

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Write down what MLflow does not have yet. A disk that is full costs this copy alone."""
        if self._journal is None:
            return
        try:
            with self._lock, self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            if not self._unwritten:
                _log.warning(
                    "%s cannot be written: %s; metrics that MLflow does not get are lost if this process dies", self._journal, error
                )
            self._unwritten = True

    def _put(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._waiting += 1
        self._tasks.put(lambda: self._write(entry))

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._told is None:
            self._told = self._last_steps()
        step, told = int(entry["step"]), self._told
        fresh = {name: value for name, value in entry["values"].items() if told.get(name, -1) < step}
        metrics = [Metric(name, value, int(entry["time"]), step) for name, value in fresh.items()]
        for begin in range(0, len(metrics), METRICS_AT_ONCE):  # a second try of the same values is no second point: they are its key
            self._client.log_batch(self.ref.run_id, metrics=metrics[begin : begin + METRICS_AT_ONCE])
        told |= dict.fromkeys(fresh, step)
        with self._lock:
            self._waiting -= 1
            if self._waiting == 0 and self._journal is not None:
                with contextlib.suppress(OSError):  # what MLflow has is not told again
                    self._journal.write_text("", encoding="utf-8")

    def _last_steps(self) -> dict[str, int]:
        names = self._client.get_run(self.ref.run_id).data.metrics
        return {name: max(each.step for each in self._client.get_metric_history(self.ref.run_id, name)) for name in names}

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not self._carry_out(task):
                return

    def _carry_out(self, task: Callable[[], None]) -> bool:
        """Try until it is done; False when it never will be."""
        pause, closing_since = 1.0, None
        while True:
            try:
                with redacting(self.ref.uri):
                    task()
            except Exception as error:  # a fault of the thread's is told by the next call, whatever it is
                if closing_since is None and self._closing.is_set():
                    closing_since = time.monotonic()
                gone_for = 0.0 if closing_since is None else time.monotonic() - closing_since
                if _is_final(error) or (closing_since is not None and gone_for >= self._patience):
                    where = f"; what it lacks lies in {self._journal}" if self._journal is not None else ""
                    self._fault = RuntimeError(f"{error}{where}")
                    return False
                if not self._away:
                    _log.warning("MLflow cannot be reached, training goes on and tries again: %s", error)
                self._away = str(error)
                self._closing.wait(pause) if closing_since is None else time.sleep(min(pause, max(0.0, self._patience - gone_for)))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._away:
                    _log.warning("MLflow is back")
                self._away = ""
                return True

    def _left_over(self) -> list[dict[str, Any]]:
        """What an earlier writer of this run could not tell. A last line that was cut off is left out."""
        entries = []
        if self._journal is not None and self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    entries.append(json.loads(line))
        return [entry for entry in entries if entry.get("run") == self.ref.run_id]

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault


def _is_final(error: Exception) -> bool:
    cause = error.__context__
    return not isinstance(cause, MlflowException | SQLAlchemyError) or getattr(cause, "error_code", "") in _FINAL
