"""One trial, as Ray Tune runs it: a function that builds its own TorchTrainer, whose workers the cluster places by themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from fiited_ray.config import Config
from fiited_ray.train.plan import make_plan
from fiited_ray.train.trainer import run
from fiited_ray.tune.records import Folder, State, Trial, trial_digest
from fiited_ray.tune.space import Settings, label

DIGEST_TAG = "fiited_ray.trial"
ENDED, ERROR = "trial_ended", "trial_error"  # in a result: it is the trial's last word; why there will be none


@dataclass(frozen=True)
class Setup:
    """What all trials of a sweep share."""

    base: Config
    data_digest: str
    ids_by_table: list[int]  # of the base's training data
    folder: Folder
    tags: dict[str, str]  # of each trial's MLflow run

    def config(self, settings: Settings) -> Config:
        """A trial's configuration. Its model lies in the sweep's folder, and only the best is put among MLflow's."""
        config = self.base.with_settings(settings)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", label(settings)).strip("-.")
        return replace(
            config,
            name=f"{name}-{self.digest(settings)[:6]}",
            output=str(self.folder.path / "runs"),
            tracking=replace(config.tracking, log_model=False),
        )

    def digest(self, settings: Settings) -> str:
        return trial_digest(self.base.with_settings(settings), self.data_digest)


def run_trial(point: dict[str, Any], setup: Setup) -> None:
    """Train `point["settings"]`, or tell at once what is known of it from before; an error is told in its own words before it is raised."""
    try:
        _run_trial(point, setup)
    except Exception as error:
        lines = str(error).strip().splitlines()
        tune.report({ERROR: lines[0].strip() if lines else type(error).__name__})
        raise


def _run_trial(point: dict[str, Any], setup: Setup) -> None:
    settings: Settings = point["settings"]
    known = setup.folder.trial(setup.digest(settings))
    if known is not None:
        tune.report(known.metrics | {ENDED: True})
        return
    config = setup.config(settings)
    same_data = config.data == setup.base.data
    plan = make_plan(config, setup.ids_by_table if same_data else None)
    tags = setup.tags | {DIGEST_TAG: setup.digest(settings)}
    outcome = run(plan, lambda text: None, name=label(settings), tags=tags, callbacks=[TuneReportCallback()])
    tune.report(outcome.metrics | {ENDED: True, "run_id": outcome.run.run_id, "model_folder": str(outcome.model_folder)})


def ended(settings: Settings, result: dict[str, Any]) -> Trial:
    """The record of a trial that Ray Tune has seen the end of."""
    numbers = {name: float(value) for name, value in result.items() if "/" in name and isinstance(value, int | float)}
    numbers["step"] = float(result.get("step", 0))
    state: State = "finished" if result.get(ENDED) else "stopped"
    return Trial(settings, state, numbers, str(result.get("run_id", "")), str(result.get("model_folder", "")))


def parent_tags(run_id: str, sweep: str) -> dict[str, str]:
    """Tags that hang a run below the sweep's in MLflow's pages."""
    return {MLFLOW_PARENT_RUN_ID: run_id, "sweep": sweep}
