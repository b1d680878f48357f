"""From Parquet files to batches of jagged ids.

Names are imported when they are asked for: checking files must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiited_ray.data.batch import Batch
    from fiited_ray.data.collate import Collator
    from fiited_ray.data.errors import DataError
    from fiited_ray.data.files import check_files
    from fiited_ray.data.reader import parquet_batches, ray_batches, ray_dataset
    from fiited_ray.data.statistics import count_distinct

__all__ = ["Batch", "Collator", "DataError", "check_files", "count_distinct", "parquet_batches", "ray_batches", "ray_dataset"]

_MODULES = {
    "Batch": "batch",
    "Collator": "collate",
    "DataError": "errors",
    "check_files": "files",
    "count_distinct": "statistics",
    "parquet_batches": "reader",
    "ray_batches": "reader",
    "ray_dataset": "reader",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
