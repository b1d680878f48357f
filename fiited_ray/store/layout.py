"""What a shard is made of, in numbers: configuration, byte plan and the virtual buckets it owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fiited_ray.config import Config, ConfigError, EmbeddingConfig
from fiited_ray.methods import chunk_of, chunks_of, fixes_rows, importance_of, store_tables
from fiited_ray.policy import levels_of

if TYPE_CHECKING:
    import torch

BUCKETS = 1024
_SET_BYTES = 64  # one set of the sketch
_STORAGE = ("float32", "bfloat16", "float16")
_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
_IMPORTANCE = ("frequency_x_norm", "norm", "lookup_norm_sum", "frequency")


def bucket_range(rank: int, workers: int) -> tuple[int, int]:
    """Virtual buckets [first, end) of a worker: contiguous, and as even as 1024 buckets can be dealt."""
    return -(-rank * BUCKETS // workers), -(-(rank + 1) * BUCKETS // workers)


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def buckets_of(raw_ids: np.ndarray, tables: np.ndarray, seed: int) -> np.ndarray:
    """Virtual bucket of each id (int64 [N]) of a table (int32 [N]), as cuda_ext/core/hash.h has it: uint64 [N]."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        before = _mix64(np.uint64(seed % 2**64) + golden * (2 * tables.astype(np.uint64) + np.uint64(1)))
        between = _mix64(before + golden)
        keys: np.ndarray = _mix64(_mix64(raw_ids.view(np.uint64) ^ before) + between)
    return keys >> np.uint64(54)


@dataclass(frozen=True)
class ShardSpec:
    """One shard's configuration. `limit_bytes` is what it may take now, None for no limit; the rest never changes."""

    seed: int
    chunk: int
    chunks: int
    storage: str
    optimizer: str
    importance: str
    tables: int
    first_bucket: int
    end_bucket: int
    sketch_sets: int  # per virtual bucket
    limit_bytes: int | None
    eps: float
    betas: tuple[float, float]
    init_scale: float
    restore_scale: float
    decay: float
    admission: float
    levels: tuple[float, ...]

    @staticmethod
    def of(config: Config, budget_bytes: int | None, rank: int = 0, workers: int = 1) -> ShardSpec:
        """The shard of worker `rank`; all shards together start with `budget_bytes`, split by their number of buckets."""
        first, end = bucket_range(rank, workers)
        embedding, policy = config.embedding, config.policy
        none_absent = budget_bytes is None or fixes_rows(config)  # a sketch of absent ids would not be used
        sets = 1 if none_absent else max(1, round((budget_bytes or 0) * policy.sketch_share / (BUCKETS * _SET_BYTES)))
        limit = None if budget_bytes is None else budget_bytes * (end - first) // BUCKETS
        if policy.max_shard_bytes is not None:
            limit = policy.max_shard_bytes if limit is None else min(limit, policy.max_shard_bytes)
        chunks = chunks_of(config)
        return ShardSpec(
            seed=config.seed,
            chunk=chunk_of(config),
            chunks=chunks,
            storage=embedding.dtype,
            optimizer=embedding.optimizer,
            importance=importance_of(config),
            tables=len(store_tables(config)),
            first_bucket=first,
            end_bucket=end,
            sketch_sets=sets,
            limit_bytes=limit,
            eps=embedding.eps,
            betas=embedding.betas,
            init_scale=embedding.init_scale,
            restore_scale=embedding.restore_scale,
            decay=policy.decay,
            admission=policy.admission,
            levels=levels_of(policy.alpha, chunks),
        )

    @property
    def dim(self) -> int:
        return self.chunk * self.chunks

    @property
    def value_bytes(self) -> int:
        return 4 if self.storage == "float32" else 2

    def state_bytes(self, width: int) -> int:
        """Optimizer state of a row with `width` chunks."""
        return _state_bytes(self.optimizer, width * self.chunk)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored vectors."""
        import torch

        return getattr(torch, self.storage)

    def state_sizes(self) -> torch.Tensor:
        """int64 [k + 1]: optimizer values of a row by width."""
        import torch

        return torch.tensor([0, *(self.state_bytes(width) // 4 for width in range(1, self.chunks + 1))])

    def plan(self) -> tuple[int, tuple[int, ...]]:
        """(bytes the shard needs with no row, bytes of a row by width 0..k), as the planner counts them.

        The bytes really taken never pass the fixed ones plus those of the rows.
        """
        from fiited_ray.store import _extension

        fixed, *row_bytes = _extension.load("fiited").store_plan(*self.numbers()).tolist()
        return fixed, (0, *row_bytes)

    def numbers(self) -> tuple[list[int], list[float]]:
        """The form in which the extension takes it."""
        signed_seed = (self.seed + 2**63) % 2**64 - 2**63
        ints = [
            signed_seed,
            self.chunk,
            self.chunks,
            _STORAGE.index(self.storage),
            _OPTIMIZERS.index(self.optimizer),
            _IMPORTANCE.index(self.importance),
            self.tables,
            self.first_bucket,
            self.end_bucket,
            self.sketch_sets,
            self.limit_bytes or 0,
        ]
        floats = [
            self.eps,
            *self.betas,
            self.init_scale,
            self.restore_scale,
            self.decay,
            self.admission,
            *self.levels,
        ]
        return ints, floats


def dense_row_bytes(embedding: EmbeddingConfig) -> int:
    """Bytes of one row of an ordinary full-width table in float32, optimizer state included."""
    return 4 * embedding.dim + _state_bytes(embedding.optimizer, embedding.dim)


def _state_bytes(optimizer: str, values: int) -> int:
    return {"sgd": 0, "adagrad": 4 * values, "rowwise_adagrad": 4, "adam": 8 * values}[optimizer]


def check_budget(config: Config, budget_bytes: int | None) -> None:
    """Refuse a budget that does not even hold the fixed parts and one full row per shard, and name the smallest that does.

    Raises:
        ConfigError: with the smallest possible budget.
    """
    if budget_bytes is None:
        return

    workers = config.train.most_workers

    def fits(budget: int) -> bool:
        for rank in range(workers):
            spec = ShardSpec.of(config, budget, rank, workers)
            fixed, row_bytes = spec.plan()
            if (spec.limit_bytes or 0) < fixed + row_bytes[-1]:
                return False
        return True

    if fits(budget_bytes):
        return
    low, high = budget_bytes, max(2 * budget_bytes, 1 << 20)
    while not fits(high):
        low, high = high, 2 * high
        if high > 1 << 60:
            raise ConfigError("policy.max_shard_bytes is below what a shard needs with no row in it; raise it")
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    given = "" if config.budget.share is None else f"{config.budget} of the dense-equivalent bytes, "
    raise ConfigError(
        f"budget: {given}{budget_bytes} bytes are too few for {workers} shard(s); the smallest possible budget here is {high} bytes"
    )
