"""Training with several workers: the same result as with one, within the budget at every step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import run_workers

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, ModelConfig, PolicyConfig, TrainConfig
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.exchange import make_exchange

BUDGET = 5_000_000
STEPS = 200
UNTIPPED = 60  # steps, some rounds among them


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("synthetic")
    train, *_ = write_synthetic(folder, SyntheticSpec(rows=60_000, test_share=0.01))
    data = DataConfig(
        train=(str(train),),
        dense=tuple(f"d{at}" for at in range(13)),
        dense_transform="log1p",
        categorical=("c0", "c2", "c3", "c9", "c15"),
        multi_hot=("c25",),
        cross=(("c5", "c7"),),
    )
    return Config(
        data=data,
        embedding=EmbeddingConfig(optimizer="adagrad"),
        policy=PolicyConfig(alpha=4.0, interval=50, decay=0.999),
        model=ModelConfig(bottom=(16,), top=(32,)),
        train=TrainConfig(batch_size=256, max_steps=STEPS),
    )


def changed(config: Config, **keys: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **keys))


@pytest.fixture(scope="module")
def one(config: Config) -> dict:
    return run_workers.run(changed(config, workers=1), BUDGET, 1)[0]


@pytest.fixture(scope="module")
def of_two(config: Config) -> dict[str, list[dict]]:
    """Of both workers, by what is special about the training."""
    two = changed(config, workers=2)
    short = changed(two, max_steps=60)
    tasks = {"nothing": (two, BUDGET), "ahead": (changed(two, overlap=1), BUDGET), "wide": (short, None), "narrow": (short, BUDGET // 8)}
    return dict(zip(tasks, run_workers.run_each(list(tasks.values()), 2), strict=True))


@pytest.fixture(scope="module")
def two(of_two: dict[str, list[dict]]) -> list[dict]:
    return of_two["nothing"]


def test_two_workers_give_the_losses_and_widths_of_one(one: dict, two: list[dict]) -> None:
    """Until a sum in another order tips a random rounding (docs/how-it-works.md), and nearly so from then on."""
    assert len(one["losses"]) == STEPS
    apart = [abs(a - b) for a, b in zip(one["losses"], two[0]["losses"], strict=True)]
    assert max(apart[:UNTIPPED]) < 1e-5
    assert max(apart) < 0.01
    widths = {key: width for each in two for key, width in each["widths"].items()}
    assert sum(len(each["widths"]) for each in two) == len(widths)  # no id is in two shards
    assert sum(widths.get(key) != width for key, width in one["widths"].items()) < 0.15 * len(widths)
    assert len(set(widths.values())) == 4  # all widths occur: the rounds did something
    assert two[0]["metrics"]["eval/auc"] == pytest.approx(one["metrics"]["eval/auc"], abs=0.01)


def test_bytes_of_all_shards_stay_below_the_budget_at_every_step(two: list[dict]) -> None:
    assert len(two[0]["totals"]) == STEPS
    assert max(two[0]["totals"]) <= BUDGET
    assert two[0]["metrics"]["bytes/peak_of_run"] <= BUDGET
    assert two[0]["metrics"]["bytes/total"] > 0.9 * BUDGET  # and the budget is used


def test_routing_ahead_of_the_step_changes_no_loss_no_width_and_no_byte(of_two: dict[str, list[dict]], two: list[dict]) -> None:
    for mine, exact in zip(of_two["ahead"], two, strict=True):
        for name in ("losses", "widths", "totals", "bytes_sent"):
            assert mine[name] == exact[name]


def test_narrow_rows_send_fewer_bytes(of_two: dict[str, list[dict]]) -> None:
    assert of_two["narrow"][0]["bytes_sent"] < 0.8 * of_two["wide"][0]["bytes_sent"]


def test_a_tail_batch_smaller_than_the_workers_is_learned_from_and_nobody_hangs(config: Config, tmp_path: Path) -> None:
    data = dataclasses.replace(config.data)
    short = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, workers=3, batch_size=6000, max_steps=None))
    train, *_ = write_synthetic(tmp_path, SyntheticSpec(rows=6002, test_share=0.0))
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, train=(str(train),)))
    results = run_workers.run(short, None, 3)
    assert len(results[0]["losses"]) == 2
    assert results[0]["metrics"]["train/logloss"] > 0


@pytest.mark.parametrize("importance", ["frequency_x_norm", "lookup_norm_sum"])
def test_rows_that_go_by_collectives_as_between_gpus_train_the_same_model(config: Config, importance: str) -> None:
    policy = PolicyConfig(importance=importance, interval=10, first_round=5)
    short = dataclasses.replace(changed(config, workers=2, max_steps=40), policy=policy)
    ways = make_exchange, run_workers.as_on_gpus
    by_sockets, by_collectives = (run_workers.run_each([(short, BUDGET // 8)], 2, way)[0] for way in ways)
    for one, other in zip(by_sockets, by_collectives, strict=True):
        assert one["losses"] == other["losses"]
        assert one["widths"] == other["widths"]
        assert one["bytes_sent"] < other["bytes_sent"] < 1.01 * one["bytes_sent"]  # which tells the sizes beside
