"""The scale model: facts that must hold whatever the constants are, and the measurements it is checked against."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model = benchmark("scale_model")
CLUSTERS = [model.cpu_cluster(), model.gpu_cluster()]
WORK = model.Workload(ids=1e8)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: cluster.name)
@pytest.mark.parametrize("workers", [1, 2, 8, 64, 1024])
def test_the_terms_are_not_negative_and_sum_to_the_step(cluster: object, workers: int) -> None:
    result = model.predict(cluster, WORK, workers)
    assert min(result["terms"].values()) >= 0
    assert sum(result["terms"].values()) == pytest.approx(result["step"])
    assert result["terms"][result["dominant"]] == max(result["terms"].values())


def test_a_larger_budget_never_sends_fewer_bytes() -> None:
    sent = [
        model.predict(CLUSTERS[0], replace(WORK, budget=share), 8)["wire_bytes_per_sample"]
        for share in (1 / 256, 1 / 64, 1 / 16, 1 / 4, None)
    ]
    assert sent == sorted(sent)
    assert sent[0] < 0.8 * sent[-1]


@pytest.mark.parametrize("ids", [1e6, 1e9, 1e12])
def test_distinct_ids_are_never_more_than_lookups_nor_than_ids_and_fall_per_row_with_the_batch(ids: float) -> None:
    results = [model.predict(CLUSTERS[0], replace(WORK, ids=ids, batch=batch), 2) for batch in (64, 4096, 262_144)]
    for result in results:
        assert 0 < result["unique"] <= min(result["lookups"], ids)
    shares = [result["unique"] / result["lookups"] for result in results]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("share", [1 / 64, 1 / 16, 1 / 4])
def test_the_rows_meet_the_budget(share: float) -> None:
    work = replace(WORK, budget=share)
    budget = share * model.popularity(work).ids.sum() * (4 * work.dim + work.state_bytes)
    assert 0.8 * budget < model.widths(work, model.popularity(work)).bytes <= budget


def test_without_a_budget_every_key_travels_at_full_width() -> None:
    result = model.predict(CLUSTERS[0], replace(WORK, budget=None), 2)
    assert result["live_width"] == pytest.approx(WORK.chunks)
    keys = result["unique"] / WORK.batch / 2  # every other one is at home
    assert result["wire_bytes_per_sample"] == pytest.approx(keys * (16 + 1 + 2 * 4 * WORK.dim))


def test_more_workers_hold_fewer_rows_each_and_wait_longer_for_the_sum_of_their_reports() -> None:
    few, many = (model.predict(CLUSTERS[1], WORK, workers) for workers in (8, 64))
    assert many["rows_per_worker"] == pytest.approx(few["rows_per_worker"] / 8)
    assert few["coordinator"] < many["coordinator"] < 2 * few["coordinator"]


def test_too_few_workers_are_told_how_many_would_do() -> None:
    work = replace(WORK, ids=1e12)
    short = model.predict(CLUSTERS[1], work, 2)
    assert not short["fits_memory"]
    assert not short["fits_addresses"]
    enough = model.predict(CLUSTERS[1], work, short["least_workers"])
    assert enough["fits_memory"]
    assert enough["fits_addresses"]


def test_virtual_buckets_dealt_unevenly_make_the_busiest_owner_busier() -> None:
    ids = model.popularity(WORK)
    assert model.busiest(ids, WORK.batch, 600) > 1.1 * model.busiest(ids, WORK.batch, 512)
    assert model.busiest(ids, WORK.batch, 600) > model.busiest(ids, WORK.batch, 1024)


def test_the_measured_runs_are_accepted_and_their_trend_is_predicted() -> None:
    measured = json.loads((ROOT / "docs" / "scaling.json").read_text())
    rows = model.check(measured)
    assert {row["workers"] for row in rows} == {1, 2, 4, 8}
    for row in rows:
        if row["workers"] > 1:
            assert row["keys_per_sample"][1] == pytest.approx(row["keys_per_sample"][0], rel=0.05)
    for kind in ("strong", "weak"):
        found, expected = zip(*(row["cpu_us_per_sample"] for row in rows if row["kind"] == kind), strict=True)
        assert found[-1] > found[0]
        assert expected[-1] > expected[0]
