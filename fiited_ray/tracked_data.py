"""The data set of a run as MLflow tracks it: name, digest, source, columns and rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # MLflow makes it when it is imported
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.types.schema import Array, ColSpec, DataType, Schema
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from fiited_ray.config import Config
from fiited_ray.data.files import Files, column_statistics
from fiited_ray.train.plan import Plan

_DIGEST = 16  # hexadecimal digits
_TAIL = 8  # bytes at a Parquet file's end: the footer's length and a mark


def inputs_of(plan: Plan) -> list[DatasetInput]:
    """The training and test data of a run."""
    inputs = [_input(plan.files, plan.config, "train", "training")]
    if plan.test_files is not None:
        inputs.append(_input(plan.test_files, plan.config, "test", "evaluation"))
    return inputs


def data_digest(plan: Plan) -> str:
    """Digest of all files of a run."""
    digests = [files_digest(files) for files in (plan.files, plan.test_files) if files is not None]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:_DIGEST]


def files_digest(files: Files) -> str:
    """Digest of the files' footers: they hold each column's sizes, positions and extremes, and are read in no time."""
    total = hashlib.sha256()
    for path in files.paths:
        with Path(path).open("rb") as file:
            size = file.seek(-_TAIL, 2) + _TAIL
            footer = min(size - _TAIL, int.from_bytes(file.read(4), "little"))
            file.seek(-_TAIL - footer, 2)
            total.update(size.to_bytes(8, "little") + file.read(footer))
    return total.hexdigest()[:_DIGEST]


def name_of(files: Files) -> str:
    """What the data are called: the folder of the first file, `.../criteo/train.parquet` being criteo."""
    first = Path(files.paths[0])
    return first.parent.name or first.stem


def schema_of(files: Files, columns: list[str]) -> Schema:
    """Columns of the files as MLflow describes them.

    Lists are optional there, or it would refuse a null one, which is an empty bag; integers that may be null are its doubles, as in pandas.
    """
    types = {name: _type(pq.read_schema(files.paths[0]).field(name).type) for name in columns}
    types |= {name: DataType.double for name, kind in types.items() if kind == DataType.long and _has_nulls(files, name)}
    return Schema([ColSpec(kind, name, required=not isinstance(kind, Array)) for name, kind in types.items()])


def _input(files: Files, config: Config, role: str, context: str) -> DatasetInput:
    where = files.paths[0] if len(files.paths) == 1 else str(Path(files.paths[0]).parent)
    name = f"{name_of(files)}-{role}"
    source = LocalArtifactDatasetSource(where)
    schema = {"mlflow_colspec": schema_of(files, config.data.columns).to_dict()}
    profile = {"num_rows": files.total_rows, "num_files": len(files.paths), "synthetic": files.synthetic}
    entity = Dataset(name, files_digest(files), source._get_source_type(), source.to_json(), json.dumps(schema), json.dumps(profile))
    return DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _has_nulls(files: Files, name: str) -> bool:
    """Whether a column has nulls, or its files do not say."""
    counts = [
        each.null_count if each is not None else None for path in files.paths for each in column_statistics(pq.read_metadata(path), name)
    ]
    return any(count is None or count > 0 for count in counts)


def _type(kind: pa.DataType) -> DataType | Array:
    """The widest of MLflow's types of a kind: what is narrower, it takes as well."""
    if pa.types.is_dictionary(kind):
        return _type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return Array(_type(kind.value_type))
    if pa.types.is_integer(kind):
        return DataType.long
    if pa.types.is_boolean(kind):
        return DataType.boolean
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return DataType.string
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return DataType.binary
    return DataType.datetime if pa.types.is_temporal(kind) else DataType.double
