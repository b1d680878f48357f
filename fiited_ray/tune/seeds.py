"""Trials that differ in their seed alone, taken as one: the luck of a seed is no answer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

from fiited_ray.tune.records import Trial
from fiited_ray.tune.space import Settings

SEED = "seed"
SPREAD = "_sd"  # added to a metric's name: the sample standard deviation over seeds


def over_seeds(trials: Sequence[Trial]) -> list[Trial]:
    """Each configuration once, with the mean of each metric over its seeds, and the spread of those of quality.

    The seeds' numbers stand together in its settings. It is finished when all of its trials are; otherwise it has the state and the
    error of the first that is not, for a mean over the seeds that did well would not compare. Run and model are those of its first seed.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(without_seed(trial.settings), sort_keys=True), []).append(trial)
    return [_together(group) if len(group) > 1 else group[0] for group in groups.values()]


def without_seed(settings: Mapping[str, object]) -> Settings:
    """Settings that hold for any seed."""
    return {key: value for key, value in settings.items() if key != SEED}


def _together(group: list[Trial]) -> Trial:
    group = sorted(group, key=lambda trial: str(trial.settings.get(SEED, "")))
    seeds = tuple(trial.settings.get(SEED, "-") for trial in group)
    names = [name for name in group[0].metrics if all(name in trial.metrics for trial in group)]
    metrics = {name: statistics.fmean(trial.metrics[name] for trial in group) for name in names}
    for name in names:
        if name.endswith(("/auc", "/ne")):
            metrics[name + SPREAD] = statistics.stdev(trial.metrics[name] for trial in group)
    worst = next((trial for trial in group if trial.state != "finished"), group[0])
    return Trial(without_seed(group[0].settings) | {SEED: seeds}, worst.state, metrics, group[0].run_id, group[0].model_folder, worst.error)
