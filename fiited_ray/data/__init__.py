"""From Parquet files to batches of jagged ids."""

from fiited_ray.data.batch import Batch, DataError
from fiited_ray.data.collate import Collator
from fiited_ray.data.files import check_files
from fiited_ray.data.reader import parquet_batches, ray_batches, ray_dataset
from fiited_ray.data.statistics import count_distinct

__all__ = ["Batch", "Collator", "DataError", "check_files", "count_distinct", "parquet_batches", "ray_batches", "ray_dataset"]
