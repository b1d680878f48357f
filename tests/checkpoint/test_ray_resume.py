"""A Ray Train job that stopped and is submitted again goes on from its last checkpoint, in the same MLflow run, to the same end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlflow
import pytest
import torch
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from fiited_ray.checkpoint import Saved, load_model
from fiited_ray.config import (
    Budget,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
)
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import check_files, parquet_batches
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.exchange import Solo
from fiited_ray.train.loop import Worker, train
from fiited_ray.train.plan import Plan, make_plan
from fiited_ray.train.resume import resume_point
from fiited_ray.train.trainer import run

STEPS, STOP, BATCH = 14, 8, 500


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("resume")
    train_file, test_file = write_synthetic(folder, SyntheticSpec(rows=8000))
    return Config(
        data=DataConfig(train=(str(train_file),), test=(str(test_file),), dense=("d0", "d1"), categorical=("c0", "c2", "c5")),
        name="again",
        budget=Budget(bytes=500_000),
        output=f"fsspec+file://{folder}/runs",  # through fsspec, as any filesystem it knows
        embedding=EmbeddingConfig(dim=8, chunk=4),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=1, batch_size=BATCH, max_steps=STEPS),
        checkpoint=CheckpointConfig(every=2, incremental=1, keep=1, restarts=0),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", log_every=2),
    )


def uninterrupted(plan: Plan) -> tuple[Worker, dict[str, float]]:
    """The same training in this process, without Ray."""
    config, test = plan.config, plan.test_files
    assert test is not None
    worker = Worker(config, plan.budget_bytes, Solo(), LocalDecider(config.policy))
    results = train(worker, lambda: parquet_batches(plan.files, config.data, BATCH), lambda: parquet_batches(test, config.data, 4 * BATCH))
    return worker, results


def test_a_job_submitted_again_ends_as_if_it_had_never_stopped_and_is_brought_to_its_end_in_mlflow(config: Config, ray_local: None) -> None:
    expected, results = uninterrupted(make_plan(config))
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=STOP))
    run(make_plan(stopped), lambda text: None)
    folder = Path(config.output.removeprefix("fsspec+file://"), config.name)
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).unlink()  # as if Ray had died before it listed them
    again = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume="always"))

    with pytest.raises(ConfigError, match=r"embedding\.dim: 16 now, but 8 when"):
        run(make_plan(dataclasses.replace(again, embedding=EmbeddingConfig(dim=16, chunk=4))), lambda text: None)
    told: list[str] = []
    outcome = run(make_plan(again), told.append)
    assert told[0].startswith("goes on from ")
    assert told[0].endswith(f"step {STOP}")

    assert {name: outcome.metrics[name] for name in results if name.startswith("eval/")} == {
        name: value for name, value in results.items() if name.startswith("eval/")
    }
    model = load_model(outcome.model_folder)
    assert model.step == STEPS
    for name, tensor in expected.shard.export_rows().tensors().items():
        assert torch.equal(tensor, model.embedding.shard.export_rows().tensors()[name]), name
    client = mlflow.MlflowClient(outcome.run.uri)
    runs = client.search_runs([outcome.run.experiment_id])
    assert [each.info.status for each in runs] == ["FINISHED"]
    assert {each.step for each in client.get_metric_history(outcome.run.run_id, "train/loss")} == set(range(2, STEPS + 1, 2))
    assert len(checkpoints(folder)) == 2  # keep, and one that it could build on; not those of the first run that Ray never listed

    assert point(config, "auto") is None  # a finished run begins anew
    assert point(config, "never") is None
    found = point(config, "always", max_steps=20)
    assert found is not None
    assert found.step == STEPS

    client.update_run(outcome.run.run_id, status="RUNNING")  # as if it had been killed before MLflow was told the end
    told.clear()
    last = run(make_plan(config), told.append)
    assert told[0].startswith("goes on from ")
    assert told[0].endswith(f"step {STEPS}")
    assert last.run.run_id == outcome.run.run_id
    assert client.get_run(outcome.run.run_id).info.status == "FINISHED"
    assert [each.step for each in client.get_metric_history(outcome.run.run_id, "train/loss")] == list(range(2, STEPS + 1, 2))
    assert load_model(last.model_folder).step == STEPS
    assert len(checkpoints(folder)) == 2


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint_2*"))  # named by date; beside them lies Ray's own list


def point(config: Config, resume: str, **settings: int) -> Saved | None:
    checkpoint = dataclasses.replace(config.checkpoint, resume=resume)
    again = dataclasses.replace(config, checkpoint=checkpoint, train=dataclasses.replace(config.train, **settings))
    return resume_point(again, check_files(config.data.train, config.data))
