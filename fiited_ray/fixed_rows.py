"""Embeddings of the methods that fix their rows beforehand: `hash`, `qr` and `uniform`.

Their rows are rows of the store like any other, always whole; what differs is which ids have which row, and what becomes of the vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fiited_ray.config import Config, ConfigError
from fiited_ray.data.batch import Batch
from fiited_ray.data.statistics import mix
from fiited_ray.embedding import Route, ShardedEmbedding, StepTotals
from fiited_ray.exchange import Exchange
from fiited_ray.methods import fixes_rows, split_tables
from fiited_ray.store.shard import ALL_KEYS, VhpiShard


def make_embedding(config: Config, shard: VhpiShard, exchange: Exchange, **settings: Any) -> ShardedEmbedding:
    """The embedding of the configured method; `settings` are those of `ShardedEmbedding`.

    Raises:
        ConfigError: for a method that fixes its rows, without them.
    """
    embedding = config.embedding
    if fixes_rows(config) and (embedding.kept_dim if config.method == "uniform" else embedding.rows) is None:
        raise ConfigError(f"method {config.method}: its rows are not known yet; fit_rows finds them")
    kinds: dict[str, Callable[..., ShardedEmbedding]] = {"hash": HashedEmbedding, "qr": ProductEmbedding, "uniform": PaddedEmbedding}
    if config.method in kinds:
        return kinds[config.method](config, shard, exchange, **settings)
    return ShardedEmbedding(shard, exchange, config.data.feature_tables, **settings)


class _FixedRows(ShardedEmbedding):
    """Rows that all find room: none has to be turned away for want of it."""

    def _quota(self, totals: StepTotals, lookups: int) -> int:
        self.totals = totals
        return ALL_KEYS


class PaddedEmbedding(_FixedRows):
    """`uniform`: all rows have the first `embedding.kept_dim` dimensions; the others read as zero."""

    def __init__(self, config: Config, shard: VhpiShard, exchange: Exchange, **settings: Any) -> None:
        super().__init__(shard, exchange, config.data.feature_tables, **settings)
        self._missing = config.embedding.dim - shard.spec.dim

    def forward(self, batch: Batch, route: Route | None = None) -> Tensor:
        return nn.functional.pad(super().forward(batch, route), (0, self._missing))


class HashedEmbedding(_FixedRows):
    """`hash`: an id has the row of its number modulo the table's rows. Tables that are not in `embedding.rows` have a row for each id."""

    def __init__(self, config: Config, shard: VhpiShard, exchange: Exchange, **settings: Any) -> None:
        super().__init__(shard, exchange, config.data.feature_tables, **settings)
        rows = config.embedding.rows or {}
        self._rows = [rows.get(config.data.tables[table]) for table in config.data.feature_tables]

    def ids_of(self, batch: Batch) -> Tensor:
        parts = [ids if rows is None else ids % rows for ids, rows in zip(_by_feature(batch, len(self._rows)), self._rows, strict=True)]
        return torch.cat(parts)


class ProductEmbedding(_FixedRows):
    """`qr`: a number below quotients x remainders, from the id's hash; its quotient and its remainder have a row each, in tables of
    their own, and the vectors of a bag of both are multiplied (as DLRM's QREmbeddingBag does).

    Features of a table that is not in `embedding.rows` have a row for each id. Remainders are features of their own, behind the others.
    """

    def __init__(self, config: Config, shard: VhpiShard, exchange: Exchange, **settings: Any) -> None:
        tables, split = config.data.tables, split_tables(config)
        names = [tables[table] for table in config.data.feature_tables]
        self._split = [feature for feature, name in enumerate(names) if name in split]
        remainder_tables = [len(tables) + split.index(names[feature]) for feature in self._split]
        super().__init__(shard, exchange, (*config.data.feature_tables, *remainder_tables), **settings)
        rows, remainders = config.embedding.rows or {}, config.embedding.remainders or {}
        self._sizes = {feature: (rows[names[feature]], remainders[names[feature]]) for feature in self._split}

    def route(self, batch: Batch, exchange: Exchange | None = None) -> Route:
        first, second = list(_by_feature(batch, len(self._tables) - len(self._split))), []
        for feature, (quotients, remainders) in self._sizes.items():
            number = mix(first[feature].numpy().view(np.uint64)) % np.uint64(quotients * remainders)
            first[feature] = torch.from_numpy((number // np.uint64(remainders)).astype(np.int64))
            second.append(torch.from_numpy((number % np.uint64(remainders)).astype(np.int64)))
        return super().route(dataclasses.replace(self._with_remainders(batch), ids=torch.cat([*first, *second])), exchange)

    def forward(self, batch: Batch, route: Route | None = None) -> Tensor:
        if route is None:
            with self.times.phase("route"):
                route = self.route(batch)
        vectors = super().forward(self._with_remainders(batch), route)
        features = vectors.shape[1] - len(self._split)
        factors = torch.ones_like(vectors[:, :features]).index_copy(1, torch.tensor(self._split, dtype=torch.int64), vectors[:, features:])
        return vectors[:, :features] * factors

    def _with_remainders(self, batch: Batch) -> Batch:
        """The batch with the bags of the features that are split once more at its end, of the same lengths and weights."""
        rows, offsets, weights = batch.rows, [batch.offsets[:-1]], [batch.weights]
        end = batch.offsets[-1]
        for feature in self._split:
            begin, stop = batch.offsets[feature * rows], batch.offsets[(feature + 1) * rows]
            offsets.append(batch.offsets[feature * rows : (feature + 1) * rows] - begin + end)
            end = end + stop - begin
            weights.append(None if batch.weights is None else batch.weights[begin:stop])
        joined = None if batch.weights is None else torch.cat([each for each in weights if each is not None])
        return dataclasses.replace(batch, offsets=torch.cat([*offsets, end[None]]), weights=joined)


def _by_feature(batch: Batch, features: int) -> tuple[Tensor, ...]:
    """The ids of each feature."""
    if batch.rows == 0:  # a worker without a row in a short batch
        return (batch.ids,) * features
    return torch.tensor_split(batch.ids, batch.offsets[batch.rows : -1 : batch.rows].cpu())
