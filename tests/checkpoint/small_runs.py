"""Small runs on drawn batches, without Ray, for the tests of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiited_ray.checkpoint import Folder, FolderPublisher, Saved, Saver, open_checkpoint, restore
from fiited_ray.config import CheckpointConfig, Config, DataConfig, EmbeddingConfig, ModelConfig, PolicyConfig, TrackingConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.exchange import Solo
from fiited_ray.train.loop import Worker, train

BUDGET = 400_000
ROWS = 64
BATCHES = 24  # of an epoch


def config(steps: int = 40, workers: int = 1, **groups: dict[str, Any]) -> Config:
    """D = 32 in 4 chunks, two epochs, rounds that crowd; `groups` change keys, such as checkpoint={"every": 5}."""
    made = Config(
        data=DataConfig(train=("unused",), categorical=("a", "b"), dense=("d",)),
        embedding=EmbeddingConfig(),
        policy=PolicyConfig(interval=10, first_round=5),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=workers, batch_size=ROWS * workers, epochs=2, max_steps=steps, progressive=True),
        checkpoint=CheckpointConfig(every=6, incremental=2),
        tracking=TrackingConfig(log_every=4),
    )
    return dataclasses.replace(made, **{name: dataclasses.replace(getattr(made, name), **keys) for name, keys in groups.items()})


def batches(first: int = 0, rank: int = 0, count: int = BATCHES) -> Iterator[Batch]:
    """Ids come from an ever larger range, so that rows find no room."""

    def drawn() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(rank)
        for number in range(count):
            labels = (torch.rand(ROWS, generator=generator) < 0.5).float()
            ids = torch.randint(0, 200 * (number + 1) ** 2, (2 * ROWS,), generator=generator)
            yield Batch(torch.rand(ROWS, 1, generator=generator), labels, ids, torch.arange(2 * ROWS + 1))

    return islice(drawn(), first, None)


def solo(made: Config, budget: int | None = BUDGET) -> Worker:
    return Worker(made, budget, Solo(), LocalDecider(made.policy))


def run(worker: Worker, folder: Path) -> dict[str, float]:
    """Train from the worker's position on, with checkpoints in `folder`; the last one is whole."""
    saver = Saver(worker, FolderPublisher(Folder.of(folder)), "test")
    results = train(worker, lambda: batches(worker.position.batch, worker.exchange.rank), lambda: batches(0, 9, 3), saver)
    saver.save(finished=True)
    saver.wait()
    return results


def folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*"))


def resumed(folder: Path, made: Config, budget: int | None = BUDGET) -> Worker:
    worker = solo(made, budget)
    restore(opened(folder), worker)
    worker.shard.check()
    return worker


def opened(folder: Path) -> Saved:
    return open_checkpoint(Folder.of(folder))


def state_of(worker: Worker) -> dict[str, Any]:
    """Everything that training on depends on, bit for bit."""
    cells, registers = worker.shard.sketch()
    addresses, _, _ = worker.shard.changed(True)
    found: dict[str, Any] = {f"rows/{name}": tensor for name, tensor in worker.shard.take(addresses).tensors().items()}
    found |= {f"dense/{name}": tensor for name, tensor in worker.dense.state_dict().items()}
    for number, state in worker.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{number}/{name}": tensor for name, tensor in state.items()}
    found |= {"addresses": addresses, "cells": cells, "registers": registers, "generator": torch.get_rng_state()}
    found |= {"window": worker.window.state(), "progressive": worker.progressive.state()}
    found |= {"shard": worker.shard.state(), "stats": worker.shard.stats().planned, "threshold": (worker.threshold, worker.shard.threshold)}
    found |= {"schedule": (worker.schedule.gap, worker.schedule.last_step, worker.schedule.rounds), "position": worker.position}
    found |= {"totals": worker.embedding.totals, "step": worker.step, "samples": worker.samples}
    found["losses"] = worker.losses[worker.history.reported :]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both."""

    def same(name: str) -> bool:
        mine, theirs = one.get(name), other.get(name)
        return torch.equal(mine, theirs) if isinstance(mine, Tensor) and isinstance(theirs, Tensor) else bool(mine == theirs)

    return [name for name in one.keys() | other.keys() if not same(name)]
