"""The compiled store's bins of importance are the policy's."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from helpers import learn, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.policy import BINS, importance_bin
from fiited_ray.store import Rows, VhpiShard

_ROWS = 200


def some_rows() -> Rows:
    shard = VhpiShard(make_spec())
    learn(shard, list(range(_ROWS)), torch.ones(_ROWS, shard.spec.dim), step=1)
    return shard.export_rows()


@given(st.lists(st.floats(0, 2.0**30, width=32, allow_subnormal=False), min_size=_ROWS, max_size=_ROWS))
@settings(max_examples=25, deadline=None)
def test_rows_are_counted_in_the_bins_of_the_policy(importance: list[float]) -> None:
    shard = VhpiShard(make_spec())
    shard.put(dataclasses.replace(some_rows(), importance=torch.tensor(importance, device="cpu")))
    counted = np.bincount(importance_bin(np.asarray(importance, np.float32)), minlength=BINS)
    assert np.array_equal(shard.histogram()[0].numpy(), counted)


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_rows_spread_over_all_octaves_are_counted_in_the_bins_of_the_policy(seed: int) -> None:
    importance = np.exp2(np.random.default_rng(seed).uniform(-50, 24, _ROWS)).astype(np.float32)
    shard = VhpiShard(make_spec())
    shard.put(dataclasses.replace(some_rows(), importance=torch.from_numpy(importance).cpu()))
    assert np.array_equal(shard.histogram()[0].numpy(), np.bincount(importance_bin(importance), minlength=BINS))


def test_the_histogram_is_32_kib() -> None:
    histogram = VhpiShard(make_spec()).histogram()
    assert histogram.numel() * histogram.element_size() == 32 * 1024
