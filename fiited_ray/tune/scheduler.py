"""ASHA among trials of like budget: a small budget should not lose to a large one before it has shown what it can do."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler


class AshaByBudget(FIFOScheduler):
    """One AsyncHyperBandScheduler for each octave of the budget, as trials of a search for (quality, bytes) need it.

    Args:
        time_attr: the result's entry that counts steps.
        metric, mode: the quality.
        grace: steps that every trial may train; the rungs follow at twice, four times ... as many.
        most: steps of a whole run.
    """

    def __init__(self, time_attr: str, metric: str, mode: str, grace: int, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings: dict[str, Any] = {"time_attr": time_attr, "metric": metric, "mode": mode, "grace_period": grace, "max_t": most}
        self._by_octave: dict[Any, AsyncHyperBandScheduler] = {}

    def _of(self, trial: Any) -> AsyncHyperBandScheduler:
        octave = octave_of(trial.config["settings"]["budget"])
        if octave not in self._by_octave:
            self._by_octave[octave] = AsyncHyperBandScheduler(**self._settings, reduction_factor=2, stop_last_trials=False)
        return self._by_octave[octave]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


def octave_of(budget: Any) -> Any:
    """Budgets within a factor of two of each other, from a power of two on, give the same; those without a number stand alone."""
    from fiited_ray.config import Budget

    parsed = Budget.parse(budget)
    size = parsed.bytes or parsed.share
    return None if size is None else (parsed.share is None, math.floor(math.log2(size)))
