"""Optuna's search for configurations that no other beats in both quality and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from fiited_ray.tune.measure import Measure
from fiited_ray.tune.space import BUDGET, METHOD, Choices, Range, Settings, settings_of

BYTES = "bytes/total"


class QualityAndBytes(OptunaSearch):
    """Optuna over methods, budgets and varied keys, with two objectives.

    Args:
        methods: to choose from.
        budgets, varied: what each key may be.
        known: settings of trials that have finished; they are suggested first, so that their results are told again.
    """

    def __init__(
        self,
        methods: Sequence[str],
        budgets: Choices | Range,
        varied: Mapping[str, Choices | Range],
        measure: Measure,
        seed: int,
        known: Sequence[Settings] = (),
    ) -> None:
        self._ranges: dict[str, Choices | Range] = {BUDGET: budgets, METHOD: Choices(tuple(methods)), **varied}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            space=OptunaSearch.convert_search_space({key: _domain(each) for key, each in self._ranges.items()}),
            metric=[measure.key, BYTES],
            mode=[measure.mode, "min"],
            points_to_evaluate=[self._point(settings) for settings in known] or None,
            seed=seed + len(known),  # with the same seed the first points sampled would be those of the first trials again
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        point = super().suggest(trial_id)
        if point is None:
            return None
        values = {key: each.setting(point[key]) if isinstance(each, Range) else point[key] for key, each in self._ranges.items()}
        return {"settings": settings_of(values.pop(METHOD), values.pop(BUDGET)) | values}

    def _point(self, settings: Settings) -> dict[str, Any]:
        """The point of the space that `suggest` makes these settings of."""
        return {key: each.number(settings[key]) if isinstance(each, Range) else settings[key] for key, each in self._ranges.items()}


def covers(methods: Sequence[str], budgets: Choices | Range, varied: Mapping[str, Choices | Range], settings: Settings) -> bool:
    """Whether settings are a point of the space searched."""
    ranges = {BUDGET: budgets, METHOD: Choices(tuple(methods)), **varied}
    return settings.keys() == ranges.keys() and all(each.holds(settings[key]) for key, each in ranges.items())


def _domain(values: Choices | Range) -> Any:
    if isinstance(values, Choices):
        return tune.choice(list(values.values))
    if values.whole:
        return tune.lograndint(int(values.low), int(values.high) + 1) if values.log else tune.randint(int(values.low), int(values.high) + 1)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)
