"""A trained model for predictions alone: rows in, probabilities out. Needs neither Ray nor a GPU nor labels.

This is the loader that MLflow's pyfunc flavour names: `mlflow.pyfunc.load_model` calls `_load_pyfunc` with the folder of the saved model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fiited_ray.checkpoint import load_model
from fiited_ray.config import DataConfig
from fiited_ray.data.collate import Collator
from fiited_ray.data.errors import DataError
from fiited_ray.data.files import differ, holds_text

PREDICTION = "probability"
_ROWS_AT_ONCE = 16384
_WHOLE_FLOATS = 2.0**53  # below it, a float64 tells all integers apart


class Predictor:
    """A saved model in one process.

    Args:
        folder: a saved model's (see docs/checkpoints.md).

    Raises:
        CheckpointError: for a folder that is not a saved model, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)
        self.config = dataclasses.replace(self._model.config.data, time=None)  # the order of rows does not matter to a prediction
        self._collate = Collator(self.config)

    def predict(self, rows: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Probability of label 1 for each row, float64 [rows], under the rows' own index.

        Args:
            rows: the configuration's columns, the label apart; others are not looked at.
            params: taken because MLflow hands them over; there are none.

        Raises:
            DataError: naming column, row and value.
        """
        wanted = input_columns(self.config)
        missing = [name for name in wanted if name not in rows.columns]
        if missing:
            raise DataError(f"no column {', '.join(map(repr, missing))} among those given: {', '.join(map(str, rows.columns))}")
        table = self._with_whole_ids(self._with_types(pa.Table.from_pandas(rows[wanted], preserve_index=False)))
        self._check_kinds(table)
        table = table.append_column(self.config.label, pa.array([0] * len(rows), pa.int8()))  # the collator checks one; none is used
        batch = self._collate.strictly(table)  # a row cannot be left out: each has its prediction
        ends = [min(begin + _ROWS_AT_ONCE, len(rows)) for begin in range(0, len(rows), _ROWS_AT_ONCE)]
        parts = [torch.sigmoid(self._model.logits(each)) for each in batch.split(ends, len(self.config.features))]
        scores = torch.cat(parts) if parts else torch.empty(0)
        return pd.DataFrame({PREDICTION: scores.double().numpy()}, index=rows.index)

    def _with_types(self, table: pa.Table) -> pa.Table:
        """Columns of ids and lists with the type that Arrow cannot tell where nothing is in them, as in a request of one row."""
        lists = self.config.multi_hot
        types = {name: pa.list_(pa.int64()) if name in lists else pa.int64() for name in self.config.id_columns}
        for name, kind in (types | dict.fromkeys(self.config.weights.values(), pa.list_(pa.float32()))).items():
            column = table[name]
            if column.null_count == len(column):
                typed = pa.nulls(len(column), kind)
            elif pa.types.is_list(column.type) and pa.types.is_null(column.type.value_type):
                typed = column.cast(kind)
            else:
                continue
            table = table.set_column(table.schema.get_field_index(name), name, typed)
        return table

    def _with_whole_ids(self, table: pa.Table) -> pa.Table:
        """Integer ids that pandas holds as float64, because some are missing, as integers again."""
        for name in self.config.scalar:
            if name in self.config.bins or not pa.types.is_floating(table[name].type):
                continue
            values = table[name].to_numpy()
            odd = ~np.isnan(values) & ((values != np.floor(values)) | (np.abs(values) >= _WHOLE_FLOATS))
            if odd.any():
                row = int(odd.argmax())
                raise DataError(f"column {name!r}, row {row}: {values[row]} is not an integer; ids are integers or strings")
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64(), from_pandas=True, safe=False))
        return table

    def _check_kinds(self, table: pa.Table) -> None:
        """Refuse integers where the model has learned from text, and text for integers: none of them would be known."""
        if self._model.text_ids is None:
            return
        for name in self.config.id_columns:
            values = table[name] if name not in self.config.multi_hot else pc.list_flatten(table[name])
            text = holds_text(values.type)
            if values.null_count < len(values) and text != (name in self._model.text_ids):
                raise DataError(f"column {name!r} {differ(text, 'the data that the model has learned from')}")


def input_columns(config: DataConfig) -> list[str]:
    """Columns that a prediction needs: all but the label and the time."""
    return [name for name in dataclasses.replace(config, time=None).columns if name != config.label]


def _load_pyfunc(data_path: str) -> Predictor:
    return Predictor(Path(data_path))
