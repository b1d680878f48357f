"""A trained model among MLflow's: tracked with its data, loaded without Ray, registered."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from fiited_ray import tracking
from fiited_ray.checkpoint import Folder, FolderPublisher, Saver
from fiited_ray.config import Bin, Budget, Config, DataConfig, EmbeddingConfig, ModelConfig, TrackingConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, DataError, check_files, parquet_batches
from fiited_ray.data.collate import Collator
from fiited_ray.exchange import Solo
from fiited_ray.serving import Predictor
from fiited_ray.tracked_data import files_digest, inputs_of
from fiited_ray.tracked_model import example_of, log_model
from fiited_ray.tracked_system import watching
from fiited_ray.tracking_address import RunRef
from fiited_ray.train.loop import Worker, train
from fiited_ray.train.plan import Plan, make_plan

ROOT = Path(__file__).parents[1]
ROWS = 600


def clicks(path: Path, rows: int, seed: int) -> None:
    """Rows of every kind of column, some of them without a value."""
    draw = np.random.default_rng(seed)
    user = pa.array(draw.integers(0, 50, rows), pa.int32(), mask=draw.random(rows) < 0.1)
    words = [None if at % 7 == 3 else [f"w{word}" for word in draw.integers(0, 30, at % 4)] for at in range(rows)]
    columns = {
        "label": pa.array(draw.integers(0, 2, rows), pa.int8()),
        "price": pa.array(draw.random(rows), pa.float32()),
        "user": user,
        "city": pa.array([None if at % 11 == 5 else f"c{at % 13}" for at in range(rows)]),
        "words": pa.array(words, pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), path)


@dataclasses.dataclass(frozen=True)
class Logged:
    """A model that was trained without Ray, and what MLflow calls it."""

    plan: Plan
    folder: Path
    scores: torch.Tensor  # of the test rows, by the loop's own way
    run: RunRef
    address: str


@pytest.fixture(scope="module", params=["fiited", "qr"])
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("served")
    clicks(folder / "train.parquet", 4 * ROWS, 0)
    clicks(folder / "test.parquet", ROWS, 1)
    data = DataConfig(
        train=(str(folder / "train.parquet"),),
        test=(str(folder / "test.parquet"),),
        dense=("price",),
        categorical=("user", "city"),
        multi_hot=("words",),
        cross=(("city", "band"),),
        bins={"band": Bin("price", 0.1)},
    )
    config = Config(
        data=data,
        name="served.v1",  # MLflow takes no dots
        method=request.param,
        budget=Budget(bytes=120_000),
        output=str(folder / "runs"),
        embedding=EmbeddingConfig(dim=64, chunk=32),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=1, batch_size=200),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="serving"),
    )
    plan = make_plan(config)
    worker = Worker(plan.config, plan.budget_bytes, Solo(), LocalDecider(config.policy), distinct_ids=plan.distinct_ids)
    metrics = train(worker, lambda: batches(plan, "train"), lambda: batches(plan, "test"))
    publisher = FolderPublisher(Folder.of(folder / "model"))
    saver = Saver(worker, publisher, "served", plan.files)
    saver.save(finished=True)
    saver.wait()
    model = folder / "model" / "checkpoint_000000"
    with torch.no_grad():
        scores = torch.cat([torch.sigmoid(worker.dense(batch.dense, worker.embedding(batch))) for batch in batches(plan, "test")])
    run = tracking.create_run(config, {}, inputs_of(plan))
    return Logged(plan, model, scores, run, log_model(run, plan, str(model), metrics | {"step": worker.step}))


def batches(plan: Plan, role: str) -> Iterator[Batch]:
    data = plan.config.data
    return parquet_batches(check_files(data.train if role == "train" else data.test, data), data, 200)


def given_rows(logged: Logged) -> pd.DataFrame:
    """The test rows as a client has them."""
    return pq.read_table(logged.plan.config.data.test[0]).drop_columns(["label"]).to_pandas()


LOAD = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError("there is no Ray here")
sys.meta_path.insert(0, NoRay())
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
version = mlflow.register_model(sys.argv[2], "served")
model = mlflow.pyfunc.load_model(f"models:/served/{version.version}")
scores = model.predict(model.input_example)
print(scores["probability"].to_json(orient="values"))
"""


def test_the_model_can_be_registered_and_loads_without_ray_or_gpu_and_scores_its_own_example(logged: Logged) -> None:
    command = [sys.executable, "-c", LOAD, logged.run.uri, logged.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(scores, logged.scores[: len(scores)], rtol=1e-5)


def test_the_logged_model_gives_the_probabilities_of_training_for_rows_of_every_kind(logged: Logged) -> None:
    model = mlflow.pyfunc.load_model(logged_folder(logged))
    rows = given_rows(logged)
    rows.index = pd.Index(range(7, 7 + len(rows)))
    scores = model.predict(rows)
    assert list(scores.columns) == ["probability"]
    assert scores.index.equals(rows.index)
    np.testing.assert_allclose(scores["probability"], logged.scores, rtol=1e-5)


def logged_folder(logged: Logged) -> str:
    """Where the logged model lies; loading it from there needs no global MLflow state."""
    return str(MlflowClient(logged.run.uri).get_logged_model(logged.address.removeprefix("models:/")).artifact_location)


def test_the_signature_names_every_column_but_the_label_and_wrong_columns_are_refused(logged: Logged) -> None:
    model = mlflow.pyfunc.load_model(logged_folder(logged))
    assert model.metadata.signature.inputs.input_names() == ["price", "user", "city", "words"]
    assert model.metadata.signature.outputs.input_names() == ["probability"]
    rows = given_rows(logged)
    with pytest.raises(mlflow.exceptions.MlflowException, match="city"):
        model.predict(rows.drop(columns="city"))
    with pytest.raises(DataError, match="no column 'city' among those given: price, user, words"):
        Predictor(logged.folder).predict(rows.drop(columns="city"))
    assert Predictor(logged.folder).predict(rows[:0]).empty


@pytest.mark.parametrize(
    ("name", "values", "kinds"),
    [
        ("user", "7", ("text", "integers")),
        ("city", 7, ("integers", "text")),
        ("words", [7], ("integers", "text")),
    ],
)
def test_ids_of_another_kind_than_those_trained_on_are_refused(logged: Logged, name: str, values: Any, kinds: tuple[str, str]) -> None:
    rows = given_rows(logged)[:2]
    rows[name] = pd.Series([values] * 2, dtype=object)
    message = f"column '{name}' holds {kinds[0]}, but {kinds[1]} in the data that the model has learned from"
    with pytest.raises(DataError, match=message):
        Predictor(logged.folder).predict(rows)


def test_a_file_of_ids_of_another_kind_is_not_scored(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(logged.plan.config.data.test[0])
    text = table["user"].cast(pa.int64()).cast(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("user"), "user", text), tmp_path / "text.parquet")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(logged.folder), "--data", str(tmp_path / "text.parquet")])
    assert runpy.run_path(str(ROOT / "jobs" / "evaluate.py"))["main"]() == 2
    assert f"text.parquet: column 'user' holds text, but integers in the data that {logged.folder} has" in capsys.readouterr().err


def test_an_id_that_is_no_integer_is_refused_by_its_row(logged: Logged) -> None:
    rows = given_rows(logged)
    rows.loc[3, "user"] = 2.5
    with pytest.raises(DataError, match=r"column 'user', row 3: 2\.5 is not an integer"):
        Predictor(logged.folder).predict(rows)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_bad_row_is_refused_by_its_number_in_the_request_whatever_training_did_with_bad_rows(logged: Logged, bad_rows: str) -> None:
    predictor = Predictor(logged.folder)
    predictor._collate = Collator(dataclasses.replace(predictor.config, bad_rows=bad_rows))
    rows = pd.concat([given_rows(logged)] * 30, ignore_index=True)
    rows.loc[17_000, "price"] = np.inf
    with pytest.raises(DataError, match=r"column 'price', row 17000: inf"):
        predictor.predict(rows)


@pytest.mark.parametrize("missing", [{"words": None}, {"words": []}, {"words": np.nan}, {"user": None}, {"city": None}], ids=str)
def test_a_row_alone_that_misses_a_value_is_scored_as_among_others(logged: Logged, missing: dict[str, Any]) -> None:
    rows = given_rows(logged)[:2].astype({"user": object})
    for name, value in missing.items():
        rows[name] = pd.Series([value, rows[name][1]], dtype=object)
    predictor = Predictor(logged.folder)
    alone, among = predictor.predict(rows[:1]), predictor.predict(rows)
    np.testing.assert_allclose(alone["probability"][0], among["probability"][0], rtol=1e-6)


def test_the_example_is_the_first_rows_of_the_test_data(logged: Logged) -> None:
    example = example_of(logged.plan)
    assert example["city"].tolist() == given_rows(logged)["city"].tolist()[: len(example)]
    assert [each for each in example["words"] if each is not None and not isinstance(each, list)] == []


def test_the_models_page_shows_its_scores_on_the_test_data(logged: Logged) -> None:
    client = MlflowClient(logged.run.uri)
    model = client.get_logged_model(logged.address.removeprefix("models:/"))
    scores = {metric.key: (metric.dataset_name, metric.dataset_digest) for metric in model.metrics or ()}
    assert logged.plan.test_files is not None
    digest = files_digest(logged.plan.test_files)
    assert scores["eval/auc"] == (f"{Path(logged.plan.test_files.paths[0]).parent.name}-test", digest)
    assert [output.model_id for output in client.get_run(logged.run.run_id).outputs.model_outputs] == [model.model_id]


def test_a_run_names_its_data_sets_with_rows_columns_and_digest(logged: Logged) -> None:
    inputs = MlflowClient(logged.run.uri).get_run(logged.run.run_id).inputs.dataset_inputs
    found = {each.tags[0].value: each.dataset for each in inputs}
    assert json.loads(found["training"].profile)["num_rows"] == 4 * ROWS
    assert json.loads(found["evaluation"].source) == {"uri": logged.plan.config.data.test[0]}
    columns = {column["name"]: column["type"] for column in json.loads(found["training"].schema)["mlflow_colspec"]}
    assert columns == {"label": "long", "price": "double", "user": "double", "city": "string", "words": "array"}
    assert found["training"].digest == files_digest(logged.plan.files) != found["evaluation"].digest


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    data = DataConfig(categorical=("user",))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        clicks(tmp_path / f"{name}.parquet", 100, seed)
    first, same, other = (files_digest(check_files((str(tmp_path / f"{name}.parquet"),), data)) for name in "abc")
    assert first == same != other


def test_the_machine_is_watched_as_long_as_the_context_lasts(logged: Logged) -> None:
    run = tracking.create_run(logged.plan.config, {})
    client = MlflowClient(run.uri)
    with watching(run, 0.05):
        while "system/cpu_utilization_percentage" not in client.get_run(run.run_id).data.metrics:
            time.sleep(0.05)
    metrics = client.get_run(run.run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    silent = tracking.create_run(logged.plan.config, {})
    with watching(silent, 0):
        pass
    assert not client.get_run(silent.run_id).data.metrics
