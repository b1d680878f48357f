"""Every method through the ordinary loop with two workers: within its budget, with the same metrics, and as with one worker."""

from __future__ import annotations

import dataclasses

import pytest
import run_workers

from fiited_ray.config import Budget, Config, DataConfig, EmbeddingConfig, ModelConfig, PolicyConfig, TrainConfig
from fiited_ray.data import check_files, count_distinct
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.fitting import settle

METHODS = ("fiited", "adaembed", "frequency", "hash", "qr", "uniform", "full")
FIXED = ("hash", "qr", "uniform")
STEPS = 40


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, int | None]]:
    train, *_ = write_synthetic(tmp_path_factory.mktemp("synthetic"), SyntheticSpec(rows=20_000, test_share=0.0))
    data = DataConfig(train=(str(train),), dense=("d0",), categorical=("c0", "c2", "c3"), multi_hot=("c25",), cross=(("c5", "c7"),))
    config = Config(
        data=data,
        budget=Budget(share=0.4),
        embedding=EmbeddingConfig(dim=32, chunk=8, optimizer="adagrad"),
        policy=PolicyConfig(interval=20, decay=0.999),
        model=ModelConfig(bottom=(16,), top=(32,)),
        train=TrainConfig(batch_size=256, max_steps=STEPS),
    )
    distinct = count_distinct(check_files(data.train, data), data)
    one = dataclasses.replace(config.train, workers=1)
    return {method: settle(dataclasses.replace(config, method=method, train=one), distinct) for method in METHODS}


@pytest.fixture(scope="module")
def results(tasks: dict[str, tuple[Config, int | None]]) -> dict[str, list[dict]]:
    """Of both workers, by method."""
    return dict(zip(METHODS, run_workers.run_each(list(tasks.values()), 2), strict=True))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, tuple[Config, int | None]]) -> dict[str, dict]:
    """Of one worker, for the methods whose rows do not come and go (`test_workers.py` has the others)."""
    return {method: each[0] for method, each in zip(FIXED, run_workers.run_each([tasks[method] for method in FIXED], 1), strict=True)}


@pytest.mark.parametrize("method", FIXED)
def test_two_workers_give_the_losses_and_rows_of_one(method: str, alone: dict[str, dict], results: dict[str, list[dict]]) -> None:
    one, two = alone[method], results[method]
    assert len(one["losses"]) == STEPS
    assert max(abs(a - b) for a, b in zip(one["losses"], two[0]["losses"], strict=True)) < 1e-5
    assert {key: width for each in two for key, width in each["widths"].items()} == one["widths"]


@pytest.mark.parametrize("method", METHODS[:-1])
def test_everything_counted_stays_within_the_budget_at_every_step(
    method: str, tasks: dict[str, tuple[Config, int | None]], results: dict[str, list[dict]]
) -> None:
    budget, (first, _) = tasks[method][1], results[method]
    assert budget is not None
    assert len(first["totals"]) == STEPS
    assert 0.5 * budget < max(first["totals"]) <= budget
    assert first["metrics"]["bytes/peak_of_run"] <= budget


def test_all_methods_report_the_same_metrics(results: dict[str, list[dict]]) -> None:
    def names(method: str) -> set[str]:
        return {name for name in results[method][0]["metrics"] if not name.startswith(("rows/width_", "rows/table/", "bytes/budget"))}

    for method in METHODS:
        assert names(method) == names("fiited")
        assert 0 < results[method][0]["metrics"]["parameters/kept_share"] <= 1
