"""A saved model for scoring: no Ray, no process group, one shard that holds all rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.load import load_shard
from fiited_ray.checkpoint.saved import open_checkpoint
from fiited_ray.checkpoint.training import load_dense
from fiited_ray.config import Config
from fiited_ray.data.batch import Batch
from fiited_ray.embedding import ShardedEmbedding
from fiited_ray.exchange import Solo
from fiited_ray.fixed_rows import make_embedding
from fiited_ray.models import build_model
from fiited_ray.store import ShardSpec, VhpiShard


@dataclass(frozen=True)
class Model:
    """A trained model, in evaluation mode."""

    config: Config
    step: int  # training steps behind it
    text_ids: frozenset[str] | None  # columns of its training data whose ids were text, where that is known
    embedding: ShardedEmbedding
    dense: nn.Module

    @property
    def rows(self) -> int:
        """Embedding rows."""
        return self.embedding.shard.stats().rows

    def logits(self, batch: Batch) -> Tensor:
        """float32 [B]: scores before the sigmoid. Ids without a row count as zero vectors.

        Raises:
            DataError: naming what is wrong with the batch.
        """
        batch.validate(self.config.data.features, self.config.data.dense)
        with torch.no_grad():
            return self.dense(batch.dense, self.embedding(batch))


def load_model(location: str | Path) -> Model:
    """Load a checkpoint for scoring, whatever the number of workers that wrote it.

    Args:
        location: the checkpoint's folder or address.

    Raises:
        CheckpointError: naming the file that is missing, damaged or foreign.
    """
    saved = open_checkpoint(Folder.of(location))
    config = saved.config()
    shard = VhpiShard(ShardSpec.of(config, None))
    load_shard(saved, shard)
    dense = build_model(config.model, len(config.data.dense), len(config.data.features), config.embedding.dim)
    load_dense(saved, dense)
    embedding = make_embedding(config, shard, Solo(), lr=config.embedding.lr, mean=config.embedding.pooling == "mean")
    return Model(config, saved.step, saved.text_ids, embedding.eval(), dense.eval())
