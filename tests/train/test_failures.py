"""Workers killed in every phase of a step, on a real Ray: the run goes on from its last checkpoint by itself, and MLflow shows one run."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray.cloudpickle
from failing_runs import ROOT, assert_one_run, config_file, small_config

from fiited_ray.config import CheckpointConfig
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


def test_a_run_told_to_end_saves_and_the_same_command_goes_on_with_the_same_run(tmp_path: Path) -> None:
    stopped = small_config(tmp_path, train={"workers": 1, "max_steps": None, "epochs": 40, "debug": False})
    stopped = dataclasses.replace(stopped, checkpoint=CheckpointConfig(every=None))
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(config_file(stopped))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("step "):
                job.send_signal(signal.SIGTERM)
                break
        rest = job.stdout.read()
    assert job.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in rest
    client = mlflow.MlflowClient(stopped.tracking.uri)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    last = max(each.step for each in client.get_metric_history(run.info.run_id, "train/loss"))
    more = subprocess.run(
        [*command, f"train.max_steps={last + 20}"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert more.returncode == 0, more.stderr
    assert "goes on from " in more.stdout
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    assert steps[-1] == last + 20
