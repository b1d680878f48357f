"""Saved by N workers, loaded by M: the same rows bit for bit, sketch and counters where their buckets are, whole or in a chain."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import config
from torch import Tensor

from fiited_ray.checkpoint import Folder, FolderPublisher, Saver, open_checkpoint
from fiited_ray.checkpoint.load import load_shard
from fiited_ray.config import CheckpointConfig, Config
from fiited_ray.coordinator import LocalDecider
from fiited_ray.exchange import Solo
from fiited_ray.store import ShardSpec, VhpiShard, ops
from fiited_ray.train.loop import Worker

BUDGET = 1_000_000


class Among(Solo):
    """A worker's place among others that take their turns in this process, rank 0 first: what it says to all, the others hear."""

    def __init__(self, rank: int, workers: int, said: list[Tensor]) -> None:
        self.rank, self.workers = rank, workers
        self._said, self._heard = said, 0

    def all_reduce(self, values: Tensor) -> Tensor:
        if self.rank == 0:
            self._said.append(values)
        self._heard += 1
        return self._said[self._heard - 1]


def make_workers(count: int, made: Config) -> list[Worker]:
    """Workers with a shard each; no process group joins them."""
    said: list[Tensor] = []
    workers = []
    for rank in range(count):
        worker = Worker(made, BUDGET, Solo(), LocalDecider(made.policy))
        worker.exchange = Among(rank, count, said)
        worker.shard = worker.embedding.shard = VhpiShard(ShardSpec.of(made, BUDGET, rank, count))
        worker.shard.set_limit(BUDGET)
        workers.append(worker)
    return workers


def learn(workers: list[Worker], step: int, random: np.random.Generator) -> None:
    """One step on the same drawn ids for all shards together."""
    spec = workers[0].shard.spec
    ids = torch.from_numpy(random.zipf(1.2, 400) % 5000)
    local = ops.dedup_ids(ids, torch.tensor([200, 400]), torch.tensor([0, 1], dtype=torch.int32), spec.seed, len(workers))
    ends = np.cumsum(local.splits.tolist())
    for worker, end, count in zip(workers, ends, local.splits.tolist(), strict=True):
        mine = slice(int(end) - count, int(end))
        keys, tables, counts = local.keys[mine], local.tables[mine], local.counts[mine]
        found = worker.shard.lookup(keys, tables, counts, training=True, step=step)
        sizes = int(ops.gradient_sizes(found.widths, spec.chunk, spec.chunks).sum())
        worker.shard.update(found, torch.from_numpy(random.normal(size=sizes)).float(), torch.ones(count), 0.1, step)
        worker.embedding.step = step


def rows_of(shards: list[VhpiShard]) -> dict[tuple[int, int], tuple[bytes, ...]]:
    """Rows by table and id, in bits: width, scaled importance, vector, optimizer state."""
    out = {}
    for shard in shards:
        rows = shard.take(shard.changed(True)[0])
        widths = rows.widths.long()
        values = rows.values.split((widths * shard.spec.chunk).tolist())
        state = rows.state.split(shard.spec.state_sizes()[widths].tolist())
        for at, (raw, table) in enumerate(zip(rows.raw_ids.tolist(), rows.tables.tolist(), strict=True)):
            out[table, raw] = (bytes([int(widths[at])]), bits(rows.importance[at]), bits(values[at]), bits(state[at]))
    return out


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    increments=st.integers(0, 3),
    optimizer=st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    decay=st.sampled_from([1.0, 0.2]),
)
def test_any_number_of_workers_loads_what_any_number_saved(
    before: int, after: int, seed: int, increments: int, optimizer: str, dtype: str, decay: float
) -> None:
    made = config(embedding={"optimizer": optimizer, "dtype": dtype}, policy={"decay": decay})
    made = dataclasses.replace(made, checkpoint=CheckpointConfig(incremental=3))
    random = np.random.default_rng(seed)
    workers = make_workers(before, made)
    with tempfile.TemporaryDirectory() as name:
        savers = [Saver(worker, FolderPublisher(Folder.of(name)), "test") for worker in workers]
        step = 0
        for _ in range(increments + 1):
            for _ in range(4):
                step += 1
                learn(workers, step, random)
            threshold = float(random.choice([0.5, 5.0, 50.0]))
            for worker in workers:
                worker.shard.resize(threshold)
                worker.threshold = threshold
            for saver in savers:
                saver.save()
                saver.wait()
        expected = rows_of([worker.shard for worker in workers])
        saved = open_checkpoint(Folder.of(name).child(f"checkpoint_{increments:06d}"))
        assert len(saved.chain()) == increments + 1
        loaded = [VhpiShard(ShardSpec.of(made, BUDGET, rank, after)) for rank in range(after)]
        for shard in loaded:
            load_shard(saved, shard)
            shard.check()
        assert rows_of(loaded) == expected
        for kind in (0, 1):  # sketch, distinct counter
            assert torch.equal(
                torch.cat([shard.sketch()[kind] for shard in loaded]), torch.cat([each.shard.sketch()[kind] for each in workers])
            )
        for at in (0, 1, 2):  # step, octaves, sketch level
            assert {shard.state()[at] for shard in loaded} == {workers[0].shard.state()[at]}
        for at in range(3, 11):  # counters
            assert sum(shard.state()[at] for shard in loaded) == sum(worker.shard.state()[at] for worker in workers)
