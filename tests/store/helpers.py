"""Shards and batches for the store's tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, PolicyConfig
from fiited_ray.store import ShardSpec, VhpiShard, ops
from fiited_ray.store.reference import ReferenceShard
from fiited_ray.store.shard import Lookup


def make_spec(budget: int | None = None, **changes: Any) -> ShardSpec:
    """D = 12 in 3 chunks of 4, two tables, unless changed."""
    config = Config(
        data=DataConfig(categorical=("a", "b")),
        embedding=EmbeddingConfig(dim=12, chunk=4, init_scale=0.1, restore_scale=0.05),
        policy=PolicyConfig(alpha=4.0, decay=0.9, admission=1.0),
    )
    return dataclasses.replace(ShardSpec.of(config, budget), **changes)


def keys_of(raw_ids: list[int], tables: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and tables of distinct (id, table) pairs given in table order."""
    ids = torch.tensor(raw_ids, dtype=torch.int64)
    found = []
    for raw, table in zip(ids, tables, strict=True):
        found.append(ops.dedup_ids(raw[None], torch.tensor([1]), torch.tensor([table], dtype=torch.int32), seed, 1).keys)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64), torch.tensor(tables, dtype=torch.int32)


def read(shard: VhpiShard | ReferenceShard, raw_ids: list[int], table: int = 0) -> Lookup:
    """Look ids up without training."""
    keys, tables = keys_of(raw_ids, [table] * len(raw_ids), shard.spec.seed)
    return shard.lookup(keys, tables, torch.ones(len(raw_ids), dtype=torch.int32), training=False)


def learn(
    shard: VhpiShard | ReferenceShard,
    raw_ids: list[int],
    gradient: Tensor,
    step: int,
    table: int = 0,
    counts: list[int] | None = None,
    lr: float = 0.1,
) -> Lookup:
    """One training step on distinct ids with a full-width gradient [U, D] each, folded as on the wire."""
    keys, tables = keys_of(raw_ids, [table] * len(raw_ids), shard.spec.seed)
    found = shard.lookup(keys, tables, torch.tensor(counts or [1] * len(raw_ids), dtype=torch.int32), training=True, step=step)
    shard.update(found, fold(gradient, found.widths, shard.spec), gradient.norm(dim=1), lr, step)
    return found


def fold(gradient: Tensor, widths: Tensor, spec: ShardSpec) -> Tensor:
    """Wire form of full-width gradients [U, D]."""
    rows = len(widths)
    bags = ops.Bags(torch.arange(rows, dtype=torch.int32), torch.arange(rows + 1), None, 1, False, spec.chunk, spec.chunks)
    return ops.wire_gradients(gradient.reshape(rows, 1, spec.dim).contiguous(), widths, bags)


def padded(shard: VhpiShard | ReferenceShard, found: Lookup) -> Tensor:
    """Full-width vectors [U, D] of a lookup."""
    rows = len(found.widths)
    bags = ops.Bags(torch.arange(rows, dtype=torch.int32), torch.arange(rows + 1), None, 1, False, shard.spec.chunk, shard.spec.chunks)
    return shard.pool(found, bags)[:, 0]
