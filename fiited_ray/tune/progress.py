"""What happens to trials while Ray Tune runs them: kept as records, told to the person who waits, and closed in MLflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from fiited_ray import tracking
from fiited_ray.tracking_address import RunRef
from fiited_ray.tune.answer import BYTES, MIB
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.records import Trial
from fiited_ray.tune.space import label
from fiited_ray.tune.trial import DIGEST_TAG, ERROR, Setup, ended


class Keeper(Callback):
    """Lives in the driver, and is the only one to write records."""

    def __init__(self, setup: Setup, parent: RunRef, measure: Measure, say: Callable[[str], None]) -> None:
        self.shared = setup
        self._parent = parent
        self._measure = measure
        self._say = say
        self._failed: dict[str, Trial] = {}  # by digest: of this time, they will be tried again
        self._most = 0
        self._begun = 0

    def expect(self, most: int) -> None:
        """A new experiment of at most so many trials begins."""
        self._most, self._begun = most, 0

    def trials(self) -> list[Trial]:
        """All that is known of the sweep."""
        return [*self.shared.folder.trials(), *self._failed.values()]

    def errors(self) -> str:
        return "; ".join(trial.error for trial in self._failed.values())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun += 1
        settings = trial.config["settings"]
        known = self.shared.folder.trial(self.shared.digest(settings)) is not None
        self._say(f"trial {self._begun} of at most {self._most}: {label(settings)}{', known from before' if known else ' ...'}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        settings = trial.config["settings"]
        digest = self.shared.digest(settings)
        if self.shared.folder.trial(digest) is not None:
            return
        record = ended(settings, trial.last_result)
        self.shared.folder.write(digest, record)
        self._failed.pop(digest, None)
        tracking.end_children(self._parent, "FINISHED", {DIGEST_TAG: digest})  # of a trial stopped early, which could not do so itself
        how = "" if record.state == "finished" else f", stopped early at step {record.metrics['step']:.0f}"
        quality, size = record.metrics.get(self._measure.key, float("nan")), record.metrics.get(BYTES, float("nan"))
        self._say(f"  {label(settings)}: {self._measure.label} {quality:.4f}, {size / MIB:,.1f} MiB{how}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        settings = trial.config["settings"]
        digest = self.shared.digest(settings)
        error = str(trial.last_result.get(ERROR, "its process died"))
        self._failed[digest] = Trial(settings, "failed", error=error)
        tracking.end_children(self._parent, "FAILED", {DIGEST_TAG: digest})
        self._say(f"  {label(settings)}: failed: {error}")
