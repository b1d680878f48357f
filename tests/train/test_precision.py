"""Training with products in bfloat16: parameters and scores stay float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fiited_ray.config import Config, DataConfig, ModelConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch
from fiited_ray.exchange import Solo
from fiited_ray.train.loop import Worker, evaluate, train


def batches(count: int) -> list[Batch]:
    """Labels that follow from the ids."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 50, (2, 64), generator=generator)
        labels = ((ids[0] * 7 + ids[1] * 3) % 5 < 2).float()
        made.append(Batch(torch.randn(64, 1, generator=generator), labels, ids.reshape(-1), torch.arange(129)))
    return made


@pytest.mark.parametrize("kind", ["dlrm", "dcnv2"])
def test_losses_are_nearly_those_of_float32_and_scoring_is_float32(kind: str) -> None:
    config = Config(
        data=DataConfig(dense=("d",), categorical=("a", "b")),
        model=ModelConfig(kind=kind, bottom=(16,), top=(16,), precision="bfloat16"),  # type: ignore[arg-type]
        train=TrainConfig(workers=1, lr=0.01),
    )
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="float32"))
    workers = [Worker(each, None, Solo(), LocalDecider(each.policy)) for each in (config, exact)]
    for worker in workers:
        train(worker, lambda: batches(150))
    mine, theirs = (torch.tensor(worker.losses) for worker in workers)
    assert not torch.equal(mine, theirs)
    assert mine[:10].mean() - mine[-10:].mean() > 0.05  # it learns
    assert (mine - theirs)[:30].abs().max() < 0.01
    assert workers[0].parameters.dtype == workers[0].gradient.dtype == torch.float32
    workers[1].dense.load_state_dict(workers[0].dense.state_dict())
    workers[1].embedding = workers[0].embedding
    assert evaluate(workers[0], batches(3)) == evaluate(workers[1], batches(3))
