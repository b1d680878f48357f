"""Weights of multi-hot ids, from a Parquet column to the rows that learn by them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, ModelConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, parquet_batches
from fiited_ray.exchange import Solo
from fiited_ray.train.loop import Worker, train_step


def vectors(worker: Worker) -> dict[int, torch.Tensor]:
    rows = worker.shard.export_rows()
    return dict(zip(rows.raw_ids.tolist(), rows.values.reshape(-1, 4), strict=True))


def opened(folder: Path, pooling: str) -> tuple[Worker, Batch]:
    """A worker whose ids 1, 2 and 3 all weigh something else in the only row there is."""
    path = folder / "a.parquet"
    pq.write_table(pa.table({"label": [1], "d": [0.5], "seen": [[1, 2, 3]], "seconds": [[1.0, 2.0, 0.0]]}), path)
    config = Config(
        data=DataConfig(train=(str(path),), dense=("d",), multi_hot=("seen",), weights={"seen": "seconds"}),
        embedding=EmbeddingConfig(dim=4, chunk=4, pooling=pooling, optimizer="sgd", lr=1.0),
        model=ModelConfig(bottom=(4,), top=(4,)),
    )
    files = check_files(config.data.train, config.data)
    (batch,) = parquet_batches(files, config.data, 8)
    return Worker(config, None, Solo(), LocalDecider(config.policy)), batch


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_an_id_learns_in_proportion_to_its_weight(tmp_path: Path, pooling: str) -> None:
    worker, batch = opened(tmp_path, pooling)
    worker.embedding.train()
    worker.embedding(batch)  # makes the rows
    before = vectors(worker)
    train_step(worker, batch)
    moved = {raw_id: after - before[raw_id] for raw_id, after in vectors(worker).items()}
    assert bool((moved[1] != 0).any())
    torch.testing.assert_close(moved[2], 2 * moved[1])
    assert bool((moved[3] == 0).all())


@pytest.mark.parametrize(("pooling", "ids"), [("sum", 1), ("mean", 3)])
def test_a_bag_is_its_weighted_sum_and_a_mean_divides_it_by_the_number_of_ids(tmp_path: Path, pooling: str, ids: int) -> None:
    worker, batch = opened(tmp_path, pooling)
    worker.embedding.train()
    pooled = worker.embedding(batch)[0, 0]
    rows = vectors(worker)
    torch.testing.assert_close(pooled, (rows[1] + 2 * rows[2]) / ids)
