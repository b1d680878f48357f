"""A trained model among MLflow's: a pyfunc with signature and input example, which the model registry takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, DataType, Schema

from fiited_ray.methods import budget_of
from fiited_ray.serving import PREDICTION, input_columns
from fiited_ray.tracked_data import files_digest, name_of, schema_of
from fiited_ray.tracking import package_version, redacting
from fiited_ray.tracking_address import RunRef
from fiited_ray.train.plan import Plan

_EXAMPLE_ROWS = 5
_NEEDED = ("mlflow", "numpy", "pandas", "pyarrow", "pyyaml", "safetensors", "torch")


def log_model(ref: RunRef, plan: Plan, folder: str, metrics: Mapping[str, float]) -> str:
    """Log the saved model in `folder`, a path or an address, as the run's; returns its address, `models:/m-...`.

    Raises:
        RuntimeError: what MLflow cannot write, naming the store.
    """
    config, step = plan.config, int(metrics["step"])
    client = MlflowClient(ref.uri)
    with redacting(ref.uri), tempfile.TemporaryDirectory() as temporary:
        about = {"method": config.method, "budget": str(budget_of(config)), "embedding.dim": str(config.embedding.dim)}
        logged = client.create_logged_model(ref.experiment_id, name=config.name.replace(".", "-"), source_run_id=ref.run_id, params=about)
        described = Model(logged.artifact_location, ref.run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        local, saved = Path(temporary) / "model", Path(temporary) / "saved"
        if "://" in folder:
            saved.mkdir()
            pa.fs.copy_files(folder, str(saved))
        mlflow.pyfunc.save_model(
            local,
            loader_module="fiited_ray.serving",
            data_path=str(saved) if "://" in folder else folder,
            mlflow_model=described,
            signature=signature_of(plan),
            input_example=example_of(plan),
            pip_requirements=[f"fiited-ray=={package_version('fiited-ray')}", *(f"{name}=={package_version(name)}" for name in _NEEDED)],
        )
        client.log_model_artifacts(logged.model_id, str(local))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        client.log_outputs(ref.run_id, [LoggedModelOutput(logged.model_id, step)])
        client.log_batch(ref.run_id, metrics=_quality(plan, logged.model_id, ref.run_id, metrics, step))
    return f"models:/{logged.model_id}"


def signature_of(plan: Plan) -> ModelSignature:
    """The columns a prediction needs, by the training files' types, and what comes back."""
    return ModelSignature(schema_of(plan.files, input_columns(plan.config.data)), Schema([ColSpec(DataType.double, PREDICTION)]))


def example_of(plan: Plan) -> pd.DataFrame:
    """The first rows of the test data, or of the training data where there are none."""
    path = (plan.test_files or plan.files).paths[0]
    with pq.ParquetFile(path) as file:
        rows = next(file.iter_batches(_EXAMPLE_ROWS, columns=input_columns(plan.config.data)))
    frame = rows.select(input_columns(plan.config.data)).to_pandas()
    for name in frame.columns:  # JSON knows lists, not arrays
        if pa.types.is_nested(rows.schema.field(name).type):
            frame[name] = [None if value is None else list(value) for value in frame[name]]
    return frame


def _quality(plan: Plan, model_id: str, run_id: str, metrics: Mapping[str, float], step: int) -> list[Metric]:
    """The final scores once more, tied to the model and the data they were measured on: so the model's page shows them."""
    now = int(time.time() * 1000)
    found = []
    for scored, files in (("eval", plan.test_files), ("progressive", plan.files)):
        for name, value in metrics.items():
            if files is not None and name.startswith(f"{scored}/") and value == value:
                data = f"{name_of(files)}-{'test' if scored == 'eval' else 'train'}"
                found.append(Metric(name, value, now, step, model_id, data, files_digest(files), run_id))
    return found
