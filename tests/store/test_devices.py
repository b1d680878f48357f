"""What is particular to devices: the same rows on each of them, and how often the host waits for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_spec
from torch import Tensor

from fiited_ray.store import ShardSpec, VhpiShard, _extension, backends, ops

FEATURES, BATCH, HOT = 2, 2000, 1


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """In place of the other modules' fixture: these tests name their devices themselves."""


def batch(step: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, offsets and weights of bags of 0 to 3 lookups. One id has more lookups than 32 x 32, many have a few, most one."""
    random = np.random.default_rng(step)
    lengths = random.integers(0, 4, FEATURES * BATCH)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    ids = random.zipf(1.2, int(offsets[-1])) % 50_000
    ids[random.random(len(ids)) < 0.4] = HOT
    weights = torch.from_numpy(random.random(len(ids), np.float32)) if weighted else None
    return torch.from_numpy(ids), offsets, weights


def trained(spec: ShardSpec, namespace: str, weighted: bool, quota: int) -> tuple[VhpiShard, list[Tensor]]:
    """A store of this namespace's after some steps and rounds, and all vectors it gave on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", namespace)
        shard, vectors = VhpiShard(spec), []
        for step in range(1, 13):
            ids, offsets, weights = batch(step, weighted)
            local = ops.dedup_ids(ids, offsets[BATCH::BATCH].contiguous(), torch.tensor([0, 1], dtype=torch.int32), spec.seed, 1)
            found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step, quota=quota)
            bags = ops.Bags(local.inverse, offsets, weights, FEATURES, weighted, spec.chunk, spec.chunks)
            vectors += [*local, shard.pool(found, bags), shard.read(found)]
            grad = torch.randn(BATCH, FEATURES, spec.dim, generator=torch.Generator().manual_seed(step))
            norms = ops.lookup_norms(grad, len(local.keys), bags)
            if step % 3:
                shard.update_pooled(found, grad, bags, norms, 0.1, step, quota)
            else:
                shard.update(found, ops.wire_gradients(grad, found.widths, bags), norms, 0.1, step, quota)
            if step % 4 == 0:
                shard.resize(2.0 * step)
            shard.check()
        return shard, vectors


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize(
    ("storage", "budget", "weighted"),
    [("float32", None, True), ("float32", 700_000, False), ("bfloat16", 500_000, True), ("float16", None, False)],
)
def test_the_emulated_device_holds_the_cpus_rows_to_the_last_bit(optimizer: str, storage: str, budget: int | None, weighted: bool) -> None:
    spec = make_spec(budget, optimizer=optimizer, storage=storage, importance="frequency_x_norm")
    ours, our_vectors = trained(spec, "fiited", weighted, 2**31)
    theirs, their_vectors = trained(spec, "fiited_emulated", weighted, 2**31)
    for mine, other in zip(our_vectors, their_vectors, strict=True):
        assert torch.equal(mine, other)
    for name, tensor in ours.export_rows().tensors().items():
        assert torch.equal(tensor, theirs.export_rows().tensors()[name]), name
    assert torch.equal(ours.histogram(), theirs.histogram())
    assert torch.equal(ours.rows_by_width(), theirs.rows_by_width())
    mine, other = ours.stats(), theirs.stats()
    for name in ("planned", "rows", "distinct", "lookups", "hits", "admitted", "refused", "resized", "evicted", "asked_bytes"):
        assert getattr(mine, name) == getattr(other, name), name
    assert other.peak <= (budget or other.peak)
    assert mine.refused > 0


def take_over(into: VhpiShard, rows_of: VhpiShard) -> None:
    torch.ops.fiited_emulated.store_import(into._handle, *rows_of.export_rows().tensors().values())


def test_rows_go_from_one_device_to_another() -> None:
    spec = make_spec(optimizer="adam", storage="bfloat16")
    ours, _ = trained(spec, "fiited", False, 2**32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", "fiited_emulated")
        theirs = VhpiShard(spec)
        take_over(theirs, ours)
        theirs.check()
    for name, tensor in ours.export_rows().tensors().items():
        assert torch.equal(tensor, theirs.export_rows().tensors()[name]), name
    with pytest.raises(RuntimeError, match=r"row 0 .* is already in the store"):
        take_over(theirs, ours)


READS = """
import torch
from test_devices import BATCH, FEATURES, batch
from helpers import make_spec
from fiited_ray.store import VhpiShard, _extension, ops
_extension.NAMESPACES["cpu"] = "fiited_emulated"
namespace = _extension.load("fiited_emulated")
shard = VhpiShard(make_spec())
for step, threshold in ((1, 0.0), (2, 5.0), (3, 5.0)):
    ids, offsets, _ = batch(step, False)
    local = ops.dedup_ids(ids, offsets[BATCH::BATCH].contiguous(), torch.tensor([0, 1], dtype=torch.int32), 0, 1)
    bags = ops.Bags(local.inverse, offsets, None, FEATURES, False, 4, 3)
    counts = [namespace.host_reads()]
    shard.lookup(local.keys, local.tables, local.counts, training=False)
    counts.append(namespace.host_reads())
    found = shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
    counts.append(namespace.host_reads())
    shard.pool(found, bags)
    counts.append(namespace.host_reads())
    shard.update_pooled(found, torch.ones(BATCH, FEATURES, 12), bags, None, 0.1, step)
    counts.append(namespace.host_reads())
    shard.stats()
    counts.append(namespace.host_reads())
    print(*(after - before for before, after in zip(counts, counts[1:])))
    shard.resize(threshold or 5.0)
"""


def test_the_host_reads_from_the_device_once_in_a_step_and_not_in_a_lookup() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"FIITED_CHECKS": "later", "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent.parent)))}
    done = subprocess.run([sys.executable, "-c", READS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    filling, *later = done.stdout.splitlines()
    assert filling == "0 1 0 1 0"  # lookup, training lookup, pool, update, stats: rows are given out at lookup, and counted by the host
    assert later == ["0 0 0 1 0", "0 0 0 1 0"]


@pytest.mark.skipif("cuda" in backends(), reason="there is a GPU here, and a store for it")
def test_a_store_for_gpus_that_is_not_there_is_refused_in_words() -> None:
    assert backends() == ("cpu",)
    with pytest.raises(ImportError, match="for GPUs: build them with"):
        VhpiShard(make_spec(), "cuda")


def refused(**tensors: Any) -> str:
    spec = make_spec()
    ids = torch.arange(8)
    good = {"keys": ops.dedup_ids(ids, torch.tensor([8]), torch.tensor([0], dtype=torch.int32), 0, 1).keys}
    good |= {"tables": torch.zeros(8, dtype=torch.int32), "counts": torch.ones(8, dtype=torch.int32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", "fiited_emulated")
        with pytest.raises(RuntimeError) as error:
            VhpiShard(make_spec(first_bucket=spec.first_bucket, end_bucket=512) if "keys" in tensors else spec).lookup(
                **(good | tensors), training=True, step=1
            )
    return str(error.value)


def test_kernels_find_bad_keys_and_name_the_first() -> None:
    assert "the table of key 3 does not exist" in refused(tables=torch.tensor([0, 1, 1, 2, 0, -1, 9, 0], dtype=torch.int32))
    foreign = torch.tensor([1, 2, -1, 3, -2, 4, 5, 6])  # the highest bucket is that of negative numbers
    assert "key 2 belongs to another shard" in refused(keys=foreign)
