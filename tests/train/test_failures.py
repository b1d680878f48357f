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
import yaml

from fiited_ray.config import (
    Budget,
    CheckpointConfig,
    Config,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PolicyConfig,
    TrackingConfig,
    TrainConfig,
)
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.train import trainer
from fiited_ray.train.plan import make_plan

ROOT = Path(__file__).parent.parent.parent
STEPS = 24
PHASES = ("route", "gather", "model", "update", "round")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("failures")
    train, _ = write_synthetic(folder, SyntheticSpec(rows=STEPS * 256 + 1000))
    return Config(
        data=DataConfig(train=(str(train),), dense=("d0",), categorical=("c0", "c2", "c5")),
        name="dying",
        budget=Budget(bytes=1_000_000),
        output=str(folder / "runs"),
        embedding=EmbeddingConfig(dim=8, chunk=4),
        policy=PolicyConfig(interval=4, first_round=2),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=2, batch_size=256, max_steps=STEPS, progressive=True, timeout_seconds=120.0, debug=True),
        checkpoint=CheckpointConfig(every=3, restarts=len(PHASES) + 1),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", log_every=2),
    )


@pytest.mark.usefixtures("ray_local")
def test_a_worker_killed_in_each_phase_costs_no_step_and_one_run_shows_each_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dying

    made = trainer.ray.train.torch.TorchTrainer

    def with_deaths(work: Any, *, train_loop_config: dict[str, Any], **arguments: Any) -> Any:
        deaths = {"deaths": str(tmp_path), "phases": PHASES, "after": {"update": 1}}
        return made(dying.work, train_loop_config=train_loop_config | deaths, **arguments)

    monkeypatch.setattr(trainer.ray.train.torch, "TorchTrainer", with_deaths)
    outcome = trainer.run(make_plan(config), lambda text: None)
    assert {each.name for each in tmp_path.iterdir()} == {*PHASES, "checkpoint"}  # each killed a worker
    client = mlflow.MlflowClient(config.tracking.uri)
    runs = client.search_runs([outcome.run.experiment_id])
    assert [each.info.status for each in runs] == ["FINISHED"]
    for name in ("train/loss", "bytes/total"):
        assert [each.step for each in client.get_metric_history(outcome.run.run_id, name)] == list(range(2, STEPS + 1, 2))


def test_a_run_told_to_end_saves_and_the_same_command_goes_on_with_the_same_run(config: Config, tmp_path: Path) -> None:
    stopped = dataclasses.replace(
        config,
        name="stopped",
        output=str(tmp_path / "runs"),
        train=dataclasses.replace(config.train, workers=1, max_steps=None, epochs=40, debug=False),
        checkpoint=CheckpointConfig(every=None),
        tracking=dataclasses.replace(config.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stopped.to_dict()))
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as job:
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
        [*command, f"train.max_steps={last + 20}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert more.returncode == 0, more.stderr
    assert "goes on from " in more.stdout
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    assert steps[-1] == last + 20
