"""Parameters as one vector learn what they would learn apart."""

from __future__ import annotations

import copy

import pytest
import torch

from fiited_ray.config import ModelConfig
from fiited_ray.models import build_model
from fiited_ray.train.joined import joined


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_one_step_of_all_is_one_step_of_each(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    apart = build_model(ModelConfig(bottom=(5,), top=(6, 3)), 3, 2, 4)
    together = copy.deepcopy(apart)
    values, gradient = joined(together)
    optimizers = [kind(apart.parameters(), lr=0.1, fused=True), kind([values], lr=0.1, fused=True)]  # type: ignore[call-arg]
    for _ in range(3):
        dense, vectors = torch.randn(7, 3), torch.randn(7, 2, 4)
        optimizers[0].zero_grad()
        gradient.zero_()
        for model, optimizer in zip((apart, together), optimizers, strict=True):
            model(dense, vectors).square().sum().backward()
            optimizer.step()
    for one, other in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, other)  # products may add up otherwise where matrices stand elsewhere
        torch.testing.assert_close(one.grad, other.grad)
        assert other.data_ptr() % 64 == values.data_ptr() % 64
    assert sum(each.count_nonzero() for each in together.parameters()) == values.count_nonzero()
