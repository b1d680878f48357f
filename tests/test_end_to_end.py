"""The main job on real Ray Train workers and a real MLflow store, and what it refuses before any worker starts."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.config import (
    Budget,
    Config,
    ConfigError,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
)
from fiited_ray.data import DataError
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.summary import summary
from fiited_ray.train.plan import Plan, make_plan
from fiited_ray.train.trainer import Outcome, first_cause, run

ROOT = Path(__file__).parent.parent


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("job")
    train, test = write_synthetic(folder, SyntheticSpec(rows=40_000))
    return Config(
        data=DataConfig(train=(str(train),), test=(str(test),), dense=("d0", "d1"), categorical=("c0", "c2", "c5"), multi_hot=("c25",)),
        name="tiny",
        budget=Budget(share=0.5),
        output=str(folder / "runs"),
        embedding=EmbeddingConfig(dim=8, chunk=4),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=2, batch_size=2000, max_steps=12, progressive=True, overlap=1),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", log_every=4),
    )


@pytest.fixture(scope="module")
def finished(config: Config, ray_local: None) -> tuple[Plan, Outcome, list[str]]:
    plan = make_plan(config)
    lines: list[str] = []
    return plan, run(plan, lines.append), lines


def test_a_run_trains_within_its_budget_and_logs_everything(finished: tuple[Plan, Outcome, list[str]]) -> None:
    plan, outcome, lines = finished
    assert plan.budget_bytes is not None
    assert 0 < outcome.metrics["bytes/peak_of_run"] <= plan.budget_bytes
    assert 0.4 < outcome.metrics["eval/auc"] < 1
    assert 0.4 < outcome.metrics["progressive/auc"] < 1
    assert lines
    client = mlflow.MlflowClient(outcome.run.uri)
    logged = client.get_run(outcome.run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["synthetic_data"] == "True"
    assert [each.step for each in client.get_metric_history(outcome.run.run_id, "train/loss")] == [4, 8, 12]
    wanted = {"train/ne", "eval/ne", "bytes/total", "bytes/index", "rows/width_2", "lookup/hit_rate", "wire/bytes_per_step", "time/wait"}
    assert wanted <= logged.data.metrics.keys()
    assert logged.data.metrics["wire/bytes_per_step"] > 0
    plots = {Path(each.path).name for each in client.list_artifacts(outcome.run.run_id, "plots")}
    assert {"bytes.png", "quality.png", "widths.png", "time.png", "hit_rate.png"} <= plots


def test_reading_through_ray_data_trains_the_same_model(finished: tuple[Plan, Outcome, list[str]], config: Config) -> None:
    data = dataclasses.replace(config.data, reader="ray")
    outcome = run(make_plan(dataclasses.replace(config, data=data, name="through-ray")), lambda text: None)
    for name in ("train/loss", "eval/auc", "bytes/total"):
        assert outcome.metrics[name] == pytest.approx(finished[1].metrics[name], rel=1e-5)


def test_full_width_and_its_model_are_told_to_have_no_budget_whatever_is_configured(config: Config, ray_local: None) -> None:
    short = dataclasses.replace(config.train, workers=1, max_steps=2)
    outcome = run(make_plan(dataclasses.replace(config, method="full", train=short, name="full-width")), lambda text: None)
    client = mlflow.MlflowClient(outcome.run.uri)
    logged = client.get_run(outcome.run.run_id)
    assert (logged.data.tags["method"], logged.data.tags["budget"]) == ("full", "none")
    (model,) = logged.outputs.model_outputs
    assert client.get_logged_model(model.model_id).params["budget"] == "none"


def test_files_out_of_time_order_are_refused_before_anything_starts_unless_ray_sorts(config: Config, tmp_path: Path) -> None:
    rows = pq.read_table(config.data.train[0]).slice(0, 100)
    pq.write_table(rows.take(pa.array(np.arange(100)[::-1].copy())), tmp_path / "turned.parquet")
    data = dataclasses.replace(config.data, train=(str(tmp_path / "turned.parquet"),), test=(), time="time")
    turned = dataclasses.replace(config, data=data, budget=Budget())
    with pytest.raises(DataError, match=r"data\.train is not in the order of 'time' .*; sort the files, or let data\.reader=ray sort"):
        make_plan(turned)
    make_plan(dataclasses.replace(turned, data=dataclasses.replace(data, reader="ray")))


def test_the_plan_says_how_many_rows_are_trained_on(config: Config) -> None:
    plan = make_plan(dataclasses.replace(config, budget=Budget(bytes=1 << 20)))
    assert plan.describe().startswith("training rows 36,000 (synthetic), embedding budget 1.00 MiB")
    fewer = dataclasses.replace(plan, config=config.with_settings({"data.max_rows": 1000}))
    assert fewer.describe().startswith("training rows 1,000 of 36,000 (synthetic), embedding budget 1.00 MiB")


def test_the_summary_tells_what_a_person_wants_to_know(finished: tuple[Plan, Outcome, list[str]]) -> None:
    plan, outcome, _ = finished
    text = summary(plan, outcome)
    for part in (
        "synthetic data",
        "AUC",
        "NE",
        "payload",
        "optimizer",
        "index",
        "sketch",
        "budget",
        "dense equivalent",
        "8 dims",
        "samples/s",
    ):
        assert part in text
    assert f"mlflow ui --host 127.0.0.1 --backend-store-uri {outcome.run.uri}" in text
    assert outcome.run.run_id in text
    assert text in mlflow.MlflowClient(outcome.run.uri).get_run(outcome.run.run_id).data.tags["mlflow.note.content"]


def test_the_saved_model_scores_as_it_did_in_training(
    finished: tuple[Plan, Outcome, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, outcome, _ = finished
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(outcome.model_folder)])
    assert job("evaluate").main() == 0
    assert f"AUC {outcome.metrics['eval/auc']:.4f}" in capsys.readouterr().out


def test_the_error_told_is_that_of_the_worker_that_began_not_of_those_that_lost_it() -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    bad = DataError("dense column 'd1', row 7: nan")
    assert first_cause({0: lost, 1: bad}) == (1, bad)
    assert first_cause({0: lost, 2: lost}) == (0, lost)


def test_an_impossible_budget_is_refused_with_the_smallest_possible_one(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"the smallest possible budget here is [0-9]+ bytes"):
        make_plan(dataclasses.replace(config, budget=Budget(bytes=5000)))


def test_nothing_to_score_is_refused(config: Config) -> None:
    silent = dataclasses.replace(
        config, data=dataclasses.replace(config.data, test=()), train=dataclasses.replace(config.train, progressive=False)
    )
    with pytest.raises(ConfigError, match="nothing would be scored"):
        make_plan(silent)
