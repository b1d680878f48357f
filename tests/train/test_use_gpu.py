"""Training on GPUs where there are none: refused in words, before anything is started or written."""

from __future__ import annotations

import pytest
import torch

from fiited_ray.config import Config, ConfigError, DataConfig, TrainConfig
from fiited_ray.train.plan import make_plan
from fiited_ray.train.worker import use_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"train\.use_gpu: torch sees no GPU here"):
        use_gpu()


def test_a_method_that_needs_the_cpu_is_refused() -> None:
    config = Config(method="qr", data=DataConfig(categorical=("a", "b")), train=TrainConfig(use_gpu=True))
    with pytest.raises(ConfigError, match=r"train\.use_gpu: method qr numbers its rows on the CPU only"):
        make_plan(config)
