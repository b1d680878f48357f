"""Workers killed in every phase of a step, on a real Ray: the run goes on from its last checkpoint by itself, and MLflow shows one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from failing_runs import assert_one_run, small_config

from fiited_ray.train import trainer
from fiited_ray.train.plan import make_plan

PHASES = ("route", "gather", "model", "update", "round")


@pytest.mark.usefixtures("ray_local")
def test_a_worker_killed_in_each_phase_costs_no_step_and_one_run_shows_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dying

    config = small_config(tmp_path)
    folder = tmp_path / "deaths"
    folder.mkdir()

    ray.cloudpickle.register_pickle_by_value(dying)  # workers of a Ray that other tests started do not find it
    made = trainer.ray.train.torch.TorchTrainer

    def with_deaths(work: Any, *, train_loop_config: dict[str, Any], **arguments: Any) -> Any:
        deaths = {"deaths": str(folder), "phases": PHASES, "after": {"update": 1}}
        return made(dying.work, train_loop_config=train_loop_config | deaths, **arguments)

    monkeypatch.setattr(trainer.ray.train.torch, "TorchTrainer", with_deaths)
    trainer.run(make_plan(config), lambda text: None)
    assert {each.name for each in folder.iterdir()} == {*PHASES, "checkpoint"}  # each killed a worker
    assert_one_run(config)
