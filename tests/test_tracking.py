"""The MLflow writer on a real SQLite store."""

from __future__ import annotations

import json
import math
import traceback
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from fiited_ray import tracking
from fiited_ray.config import Config, ConfigError, DataConfig, TrackingConfig, load
from fiited_ray.run_writer import RunWriter
from fiited_ray.tracking_address import RunRef, absolute_uri


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"
    return Config(data=DataConfig(categorical=("a", "b")), name="tried", tracking=TrackingConfig(uri=uri, experiment="some experiment"))


def test_a_run_holds_its_parameters_tags_metrics_and_artifacts(config: Config) -> None:
    ref = tracking.create_run(config, {"synthetic_data": "True"})
    writer = RunWriter(ref)
    writer.metrics(10, {"train/auc": 0.7, "rows/table/a x b": 3.0})
    writer.metrics(20, {"train/auc": 0.8, "train/ne": float("nan")})
    writer.figure("plots/some.png", Figure())
    writer.close()
    tracking.finish(ref, "FINISHED")
    client = mlflow.MlflowClient(ref.uri)
    run = client.get_run(ref.run_id)
    assert run.info.run_name == "tried"
    assert run.info.status == "FINISHED"
    assert run.data.params["embedding.dim"] == "32"
    assert "name" not in run.data.params
    assert run.data.tags["synthetic_data"] == "True"
    assert [(each.step, each.value) for each in client.get_metric_history(ref.run_id, "train/auc")] == [(10, 0.7), (20, 0.8)]
    assert run.data.metrics["rows/table/a x b"] == 3.0
    assert "train/ne" not in run.data.metrics
    text = Path(client.download_artifacts(ref.run_id, "config.yaml")).read_text()
    assert "experiment: some experiment" in text
    assert [each.path for each in client.list_artifacts(ref.run_id, "plots")] == ["plots/some.png"]


def test_metrics_that_replace_others_are_the_runs_whatever_their_step_and_those_they_lack_are_undefined(config: Config) -> None:
    ref = tracking.create_run(config, {})
    tracking.replace_metrics(ref, 176, {"eval/auc": 0.80, "rows/width_2": 5.0, "rows/table/a x b": 3.0})
    tracking.replace_metrics(ref, 176, {"eval/auc": 0.78, "rows/table/a x b": 2.0, "train/auc": float("nan")})
    client = mlflow.MlflowClient(ref.uri)
    metrics = client.get_run(ref.run_id).data.metrics
    assert math.isnan(metrics.pop("rows/width_2"))
    assert metrics == {"eval/auc": 0.78, "rows/table/a x b": 2.0}
    tracking.replace_metrics(ref, 20, {"eval/auc": 0.79})
    assert client.get_run(ref.run_id).data.metrics["eval/auc"] == 0.79
    assert [(each.step, each.value) for each in client.get_metric_history(ref.run_id, "eval/auc")] == [
        (176, 0.80),
        (177, 0.78),
        (178, 0.79),
    ]


def test_a_run_that_goes_on_with_other_settings_has_the_tags_and_the_configuration_in_force(config: Config) -> None:
    def data(path: str, role: str) -> DatasetInput:
        return DatasetInput(
            Dataset(role, f"digest of {path}", "local", json.dumps({"uri": path})), [InputTag(MLFLOW_DATASET_CONTEXT, role)]
        )

    first = [data("train.parquet", "training"), data("test.parquet", "evaluation")]
    ref = tracking.create_run(config, {"budget": str(config.budget), "sweep": "some"}, first)
    tracking.finish(ref, "KILLED")
    changed = config.with_settings({"budget": "25%", "embedding.lr": 0.5})
    again = [data("train.parquet", "training"), data("other.parquet", "evaluation")]
    assert tracking.open_run(changed, {"budget": str(changed.budget)}, ref.run_id, again) == ref
    client = mlflow.MlflowClient(ref.uri)
    run = client.get_run(ref.run_id)
    assert run.info.status == "RUNNING"
    assert {"budget": "25%", "sweep": "some"}.items() <= run.data.tags.items()
    assert load(client.download_artifacts(ref.run_id, "config.yaml")) == changed
    assert run.data.params["budget"] == "6.25%"
    digests = sorted(each.dataset.digest for each in run.inputs.dataset_inputs)
    assert digests == ["digest of other.parquet", "digest of test.parquet", "digest of train.parquet"]


def test_a_page_says_who_made_the_run_with_what_and_how_it_went(config: Config) -> None:
    ref = tracking.create_run(config, {})
    tracking.describe(ref, "AUC 0.9")
    client = mlflow.MlflowClient(ref.uri)
    tags = client.get_run(ref.run_id).data.tags
    assert tags["mlflow.note.content"] == "AUC 0.9"
    assert {"mlflow.user", "mlflow.source.name", "fiited_ray.version"} <= tags.keys()
    assert client.get_experiment(ref.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_artifacts_lie_beside_the_database_wherever_one_stands(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ref = tracking.create_run(config, {})
    run = mlflow.MlflowClient(ref.uri).get_run(ref.run_id)
    assert run.info.artifact_uri.startswith(Path(config.tracking.uri.removeprefix("sqlite:///")).parent.as_uri())
    assert not list(tmp_path.iterdir())


def test_runs_share_an_experiment(config: Config) -> None:
    first, second = tracking.create_run(config, {}), tracking.create_run(config, {})
    assert first.experiment_id == second.experiment_id
    assert first.run_id != second.run_id


def test_the_ui_command_names_the_store_and_the_page_names_the_run(config: Config) -> None:
    ref = tracking.create_run(config, {})
    assert ref.ui_command.endswith(f"--backend-store-uri {config.tracking.uri}")
    assert "--host 127.0.0.1" in ref.ui_command
    assert ref.page.endswith(f"/#/experiments/{ref.experiment_id}/runs/{ref.run_id}?workflowType=machine_learning")


def test_a_relative_database_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("http://server:5000") == "http://server:5000"


def test_credentials_are_never_shown() -> None:
    ref = RunRef("https://user:secret@host", "1", "2")
    assert ref.page == "https://***@host/#/experiments/1/runs/2?workflowType=machine_learning"
    assert "secret" not in repr(ref)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_is_told(config: Config, status: str) -> None:
    ref = tracking.create_run(config, {})
    tracking.finish(ref, status)
    assert mlflow.MlflowClient(ref.uri).get_run(ref.run_id).info.status == status


def test_credentials_are_not_in_the_message_of_a_server_that_is_away(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = replace(config, tracking=TrackingConfig(uri="http://user:secret@127.0.0.1:9/"))
    with pytest.raises(ConfigError, match=r"tracking\.uri http://\*\*\*@127\.0\.0\.1:9/") as raised:
        tracking.create_run(away, {})
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("password", ["pa#ss", "pa?ss", "pa/ss", "5000#ss", "5000/ss", "#", "pa#s@s"])
def test_a_password_that_ends_the_address_early_is_refused_unseen(config: Config, password: str) -> None:
    unescaped = replace(config, tracking=TrackingConfig(uri=f"http://user:{password}@127.0.0.1:9/"))
    with pytest.raises(ConfigError, match=r"tracking\.uri http://\*\*\*@127\.0\.0\.1:9/: .* write them as %23, %3F and %2F") as raised:
        tracking.create_run(unescaped, {})
    assert password not in str(raised.value).replace("holds a #, ? or /; write", "")


@pytest.mark.parametrize("password", ["[pa", "p\u2100ss"])
def test_a_password_that_is_no_part_of_any_address_is_refused_unseen(config: Config, password: str) -> None:
    unescaped = replace(config, tracking=TrackingConfig(uri=f"http://user:{password}@127.0.0.1:9/"))
    with pytest.raises(ConfigError, match="not an address") as raised:
        tracking.create_run(unescaped, {})
    assert password not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("uri", ["postgresql://user:secret@127.0.0.1:x/db", "mysql+nothing://user:secret@127.0.0.1/db"])
def test_credentials_are_not_in_the_message_of_a_database_that_cannot_be_opened(config: Config, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri [a-z+]*://\*\*\*@127\.0\.0\.1") as raised:
        tracking.create_run(replace(config, tracking=TrackingConfig(uri=uri)), {})
    assert "secret" not in "".join(traceback.format_exception(raised.value))


def test_credentials_are_not_in_the_message_of_a_server_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    writer = RunWriter(RunRef("http://user:secret@127.0.0.1:9", "1", "2"), patience_seconds=0)
    writer.metrics(1, {"train/loss": 0.5})
    with pytest.raises(RuntimeError, match=r"tracking\.uri http://\*\*\*@127\.0\.0\.1:9: ") as raised:
        writer.close()
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("uri", ["nonsense://somewhere", "sqlite:////proc/nowhere/x.db", "sqlite:////dev/null/x.db"])
def test_a_store_that_cannot_be_used_is_a_config_error(config: Config, uri: str) -> None:
    with pytest.raises(ConfigError, match=f"tracking.uri {uri}"):
        tracking.create_run(replace(config, tracking=TrackingConfig(uri=uri)), {})


def test_a_file_that_is_no_database_is_a_config_error(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, not a database\n" * 100)
    with pytest.raises(ConfigError, match=r"notes\.txt: file is not a database"):
        tracking.create_run(replace(config, tracking=TrackingConfig(uri=f"sqlite:///{path}")), {})
