"""The same DLRM as others' libraries train it on a CPU: torch's sparse tables, and TorchRec's with FBGEMM's fused update.

Both map an id to row `id modulo rows` of its table while the batch is made. Their dense part is the usual one (`torch.bmm`, then the
lower triangle; `nn.Linear` and `nn.ReLU`) unless they are asked to borrow ours; the dense optimizer is ours. They do nothing but train: no
check of the batch, no metrics, no loss read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fiited_ray.config import Config
from fiited_ray.data import Batch
from fiited_ray.models import build_model
from fiited_ray.train.loop import dense_optimizer

HOW_TO_INSTALL = "pip install -e '.[benchmarks]' && pip install --no-deps torchrec==1.8.0"


def plain_tower(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with a ReLU behind each."""
    return nn.Sequential(*(layer for wide, next_wide in pairwise(widths) for layer in (nn.Linear(wide, next_wide), nn.ReLU(inplace=True))))


class PlainDLRM(nn.Module):
    """DLRM as it is written everywhere: one batched matrix product of all vectors with themselves, half of it thrown away."""

    def __init__(self, dense_columns: int, features: int, dim: int, bottom: Sequence[int], top: Sequence[int]) -> None:
        super().__init__()
        self.bottom = plain_tower((dense_columns, *bottom, dim)) if dense_columns else None
        vectors = features + (1 if dense_columns else 0)
        rows, columns = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.top = plain_tower((len(rows) + (dim if dense_columns else 0), *top, 1))[:-1]

    def forward(self, dense_BC: Tensor, vectors_BFD: Tensor) -> Tensor:
        parts = []
        if self.bottom is not None:
            below_BD = self.bottom(dense_BC)
            vectors_BFD = torch.cat([below_BD[:, None], vectors_BFD], 1)
            parts.append(below_BD)
        products = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))
        parts.append(products.flatten(1).index_select(1, self.pairs))
        return self.top(torch.cat(parts, 1))[:, 0]


class Peer:
    """What both have in common; a peer adds its tables.

    Args:
        rows: of each table.
    """

    def __init__(self, config: Config, rows: list[int], borrow_dense: bool) -> None:
        torch.manual_seed(config.seed)
        self.config, self.rows = config, rows
        model, data, dim = config.model, config.data, config.embedding.dim
        if borrow_dense or model.kind != "dlrm":
            self.dense = build_model(model, len(data.dense), len(data.features), dim)
        else:
            self.dense = PlainDLRM(len(data.dense), len(data.features), dim, model.bottom, model.top)
        self.optimizer = dense_optimizer(config, self.dense.parameters())

    def place(self, batch: Batch) -> Batch:
        """Ids to rows; runs in the reading thread."""
        ends = batch.offsets[batch.rows :: batch.rows].tolist()
        ids = batch.ids.clone()
        for table, begin, end in zip(self.config.data.feature_tables, [0, *ends[:-1]], ends, strict=True):
            ids[begin:end].remainder_(self.rows[table])
        return dataclasses.replace(batch, ids=ids)

    def vectors(self, batch: Batch) -> Tensor:
        """float32 [B, F, D]."""
        raise NotImplementedError

    def update(self) -> None:
        """The tables' part of the step, where it is not fused with the backward."""

    def step(self, batch: Batch) -> None:
        vectors = self.vectors(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.model.precision == "bfloat16"):
            logits = self.dense(batch.dense, vectors).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.update()


class TorchTables(Peer):
    """nn.EmbeddingBag with sparse gradients and torch.optim.Adagrad (elementwise: torch has no row-wise one for sparse gradients)."""

    def __init__(self, config: Config, rows: list[int], borrow_dense: bool) -> None:
        super().__init__(config, rows, borrow_dense)
        dim, mode = config.embedding.dim, config.embedding.pooling
        self.tables = nn.ModuleList(nn.EmbeddingBag(each, dim, mode=mode, sparse=True) for each in rows)
        self.sparse = torch.optim.Adagrad(self.tables.parameters(), lr=config.embedding.lr)

    def vectors(self, batch: Batch) -> Tensor:
        size = batch.rows
        starts = batch.offsets[:-1:size].tolist()
        ends = batch.offsets[size::size].tolist()
        parts = [
            self.tables[table](batch.ids[begin:end], batch.offsets[at * size : (at + 1) * size] - begin)
            for at, (table, begin, end) in enumerate(zip(self.config.data.feature_tables, starts, ends, strict=True))
        ]
        return torch.stack(parts, 1)

    def update(self) -> None:
        self.sparse.step()
        self.sparse.zero_grad(set_to_none=True)


class TorchRecTables(Peer):
    """torchrec's FusedEmbeddingBagCollection: FBGEMM's table-batched op, row-wise Adagrad fused with the backward."""

    def __init__(self, config: Config, rows: list[int], borrow_dense: bool) -> None:
        import fbgemm_gpu  # noqa: F401 - loads the operators
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

        super().__init__(config, rows, borrow_dense)
        data = config.data
        self.names = list(data.features)
        pooling = PoolingType.MEAN if config.embedding.pooling == "mean" else PoolingType.SUM
        members: list[list[str]] = [[] for _ in rows]
        for feature, table in zip(self.names, data.feature_tables, strict=True):
            members[table].append(feature)
        tables = [
            EmbeddingBagConfig(name=name, embedding_dim=config.embedding.dim, num_embeddings=count, feature_names=names, pooling=pooling)
            for name, count, names in zip(data.tables, rows, members, strict=True)
        ]
        self.collection = FusedEmbeddingBagCollection(tables, optimizer_type=RowWiseAdagrad, optimizer_kwargs={"lr": config.embedding.lr})
        self.order = [self.names.index(name) for names in members for name in names]  # features come out table by table

    def vectors(self, batch: Batch) -> Tensor:
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        jagged = KeyedJaggedTensor(keys=self.names, values=batch.ids, offsets=batch.offsets)
        pooled: Any = self.collection(jagged)
        return pooled.values().view(batch.rows, len(self.names), self.config.embedding.dim)


PEERS: dict[str, type[Peer]] = {"torch": TorchTables, "torchrec": TorchRecTables}
