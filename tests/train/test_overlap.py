"""Routing ahead of the step (`train.overlap`): the same results bit for bit, errors as they are, nobody left waiting."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fiited_ray.config import Config, DataConfig, ModelConfig, PolicyConfig, TrackingConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, DataError
from fiited_ray.exchange import Solo, make_exchange
from fiited_ray.train.loop import Worker, train

BUDGET = 400_000
STEPS = 40
ROWS = 64


def config(overlap: int, workers: int = 1) -> Config:
    return Config(
        data=DataConfig(train=("unused",), categorical=("a", "b"), dense=("d",)),
        policy=PolicyConfig(interval=10, first_round=5),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=workers, batch_size=ROWS * workers, overlap=overlap, epochs=2, max_steps=STEPS, eval_every=15),
        tracking=TrackingConfig(log_every=4),
    )


def batches(rank: int = 0, count: int = 30, bad: int | None = None, broken: int | None = None) -> Iterator[Batch]:
    """Ids come from an ever larger range; batch number `bad` has a label that is none, and reading number `broken` fails."""
    generator = torch.Generator().manual_seed(rank)
    for number in range(count):
        if number == broken:
            raise DataError("log.parquet: row group 3 cannot be read")
        labels = (torch.rand(ROWS, generator=generator) < 0.5).float()
        ids = torch.randint(0, 200 * (number + 1) ** 2, (2 * ROWS,), generator=generator)
        if number == bad:
            labels[7] = 3.0
        yield Batch(torch.rand(ROWS, 1, generator=generator), labels, ids, torch.arange(2 * ROWS + 1))


def solo(overlap: int) -> Worker:
    return Worker(config(overlap), BUDGET, Solo(), LocalDecider(config(overlap).policy))


def routing_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "routes"]


def test_losses_rows_and_limits_are_those_without_overlap_bit_for_bit() -> None:
    """Epochs end, evaluations and rounds come in between, ids are turned away for want of room: no value is older than without overlap."""
    workers = [solo(overlap) for overlap in (0, 1)]
    for worker in workers:
        train(worker, batches, lambda: batches(9, 3))
    exact, ahead = workers
    assert len(exact.losses) == STEPS
    assert ahead.losses == exact.losses
    assert ahead.shard.stats() == exact.shard.stats()
    assert ahead.shard.stats().limit == BUDGET
    for name in ("policy/threshold", "train/auc", "bytes/total", "rows/total"):
        assert ahead.history.values.get(name) == exact.history.values.get(name)
    for mine, other in zip(ahead.shard.export_rows().tensors().values(), exact.shard.export_rows().tensors().values(), strict=True):
        assert torch.equal(mine, other)
    assert exact.shard.stats().asked_bytes > BUDGET  # not all found room


def test_time_the_loop_waits_and_time_spent_ahead_are_told_apart() -> None:
    worker = solo(1)
    train(worker, batches)
    phases = {name for name in worker.history.values if name.startswith(("time/", "ahead/"))}
    assert phases == {"time/wait", "time/gather", "time/model", "time/update", "time/round", "ahead/data", "ahead/route"}
    assert {len(worker.history.values[name]) for name in phases} == {STEPS // 4}


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_bad_batch_is_named_and_the_steps_before_it_are_done(overlap: int) -> None:
    worker = solo(overlap)
    with pytest.raises(DataError, match=r"label of row 7 of the batch is 3\.0"):
        train(worker, lambda: batches(bad=12))
    assert worker.step == 12
    for each in routing_threads():
        each.join(10)
    assert not routing_threads()


def test_the_thread_ends_when_a_step_fails() -> None:
    worker = solo(1)

    def fail(*_: Any) -> None:
        if worker.step == 5:
            raise ValueError("this layer is broken")

    worker.dense.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="this layer is broken"):
        train(worker, batches)
    for each in routing_threads():
        each.join(10)
    assert not routing_threads()


def _work(rank: int, broken: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    worker = Worker(config(1, 2), BUDGET, make_exchange(), LocalDecider(config(1, 2).policy))
    try:
        train(worker, lambda: batches(rank, broken=broken if rank == 1 else None))
    except Exception as error:
        (Path(folder) / f"{rank}.txt").write_text(f"step {worker.step}: {type(error).__name__}: {error}")
        raise


def test_a_worker_whose_data_fail_says_so_and_the_other_one_does_not_hang() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(mp.ProcessRaisedException):
            mp.spawn(_work, (12, folder), nprocs=2)  # returns when both processes have ended
        assert (Path(folder) / "1.txt").read_text() == "step 12: DataError: log.parquet: row group 3 cannot be read"
