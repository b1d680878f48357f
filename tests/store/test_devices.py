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


def train_on(shard: VhpiShard, steps: range, weighted: bool, quota: int) -> list[Tensor]:
    """Some steps and rounds; all vectors the store gave on the way."""
    spec, vectors = shard.spec, []
    for step in steps:
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
    return vectors


def trained(spec: ShardSpec, namespace: str, weighted: bool, quota: int) -> tuple[VhpiShard, list[Tensor]]:
    """A store of this namespace's after some steps and rounds, and all vectors it gave on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", namespace)
        shard = VhpiShard(spec)
        return shard, train_on(shard, range(1, 13), weighted, quota)


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


def loaded(saved: VhpiShard, namespace: str, placed: bool) -> VhpiShard:
    """A store of this namespace's that has taken over all of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", namespace)
        shard = VhpiShard(saved.spec)
    shard.set_limit(None)
    shard.restore(saved.state(), saved.threshold)
    cells, registers = saved.sketch()
    shard.put_sketch(0, cells, saved.state()[2], registers)
    if placed:
        shard.reserve(saved.rows_by_width().sum(0).tolist())
    for part in saved.changed(True, 900)[0].split(1500):
        shard.put(saved.take(part), part, placed)
    shard.seal()
    shard.set_limit(saved.stats().limit or None)
    shard.check()
    return shard


def assert_same(ours: VhpiShard, theirs: VhpiShard, placed: bool) -> None:
    for name, tensor in ours.export_rows().tensors().items():
        assert torch.equal(tensor, theirs.export_rows().tensors()[name]), name
    if placed:
        addresses, *pieces = ours.changed(True, 900)
        again, *pieces_again = theirs.changed(True, 900)
        assert torch.equal(addresses, again)
        assert all(map(torch.equal, pieces, pieces_again))
        for name, tensor in ours.take(addresses).tensors().items():
            assert torch.equal(tensor, theirs.take(addresses).tensors()[name]), name
    for mine, other in zip(ours.sketch(), theirs.sketch(), strict=True):
        assert torch.equal(mine, other)
    assert ours.state() == theirs.state()
    assert ours.stats().planned == theirs.stats().planned
    assert torch.equal(ours.histogram(), theirs.histogram())
    assert torch.equal(ours.rows_by_width(), theirs.rows_by_width())


@pytest.mark.parametrize(("one", "other"), [("fiited", "fiited_emulated"), ("fiited_emulated", "fiited")])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "storage", "budget"),
    [("rowwise_adagrad", "float32", 700_000), ("adam", "bfloat16", None), ("sgd", "float16", None), ("adagrad", "float32", None)],
)
def test_what_one_device_saved_another_loads_and_goes_on_with(
    one: str, other: str, placed: bool, optimizer: str, storage: str, budget: int | None
) -> None:
    spec = make_spec(budget, optimizer=optimizer, storage=storage, importance="frequency_x_norm")
    ours, _ = trained(spec, one, False, 2**31)
    theirs = loaded(ours, other, placed)
    assert_same(ours, theirs, placed)
    if placed:  # elsewhere, a round would hand rows back to the sketch in another order
        for mine, others in zip(*(train_on(shard, range(13, 17), False, 2**31) for shard in (ours, theirs)), strict=True):
            assert torch.equal(mine, others)
        assert_same(ours, theirs, placed=False)  # for they fill holes in different ways


READS = """
import torch
from test_devices import BATCH, FEATURES, batch
from helpers import make_spec
from fiited_ray.store import VhpiShard, _extension, ops
_extension.NAMESPACES["cpu"] = "fiited_emulated"
namespace = _extension.load("fiited_emulated")
shard = VhpiShard(make_spec())
for step, seed, threshold in ((1, 1, 0.0), (2, 1, 5.0), (3, 2, 5.0), (4, 3, 5.0)):
    ids, offsets, _ = batch(seed, False)
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
    shard.resize(threshold)
"""


def test_the_host_reads_from_the_device_once_in_a_step_and_not_in_a_lookup() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"FIITED_CHECKS": "later", "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent.parent)))}
    done = subprocess.run([sys.executable, "-c", READS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    filling, filled, *later = done.stdout.splitlines()  # lookup, training lookup, pool, update, stats
    assert filling == "0 2 0 0 0"  # rows are given out at lookup: how many are asked for, and which there is room for
    assert filled == "0 1 0 0 0"
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
