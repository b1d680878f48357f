"""The coordinator actor on a real Ray."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import ray

from fiited_ray.config import ConfigError, PolicyConfig
from fiited_ray.coordinator import LocalDecider, RemoteDecider, start_coordinator
from fiited_ray.policy import BINS, RoundState, ShardReport, decide

POLICY = PolicyConfig()
STATE = RoundState(200_000, 0.0, (1.0, 4.0), (0, 60, 100))


def report(seed: int, rows: int = 2000) -> ShardReport:
    counts = np.bincount(np.random.default_rng(seed).integers(500, 1500, rows), minlength=BINS)
    return ShardReport(np.stack([counts, counts * 100]), 10_000 + seed)


@pytest.mark.usefixtures("ray_local")
def test_the_actor_decides_as_the_pure_function_does() -> None:
    actor = start_coordinator(POLICY)
    reports = [report(rank) for rank in range(3)]
    expected = decide(reports, STATE, POLICY)
    assert RemoteDecider(actor).decide(7, reports, STATE) == LocalDecider(POLICY).decide(7, reports, STATE) == expected
    (told,) = ray.get(actor.telemetry.remote())
    assert (told["step"], told["threshold"], told["rows"]) == (7, expected.threshold, 6000)
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_after_the_actor_dies_the_next_rounds_proceed_and_nobody_hangs() -> None:
    actor = start_coordinator(POLICY)
    decider = RemoteDecider(actor)
    assert decider.decide(1, [report(0)], STATE) is not None
    ray.kill(actor, no_restart=False)
    answers = (RemoteDecider(actor, wait_seconds=5).decide(step, [report(0)], STATE) for step in range(2, 1000))
    assert next(answer for answer in answers if answer is not None).threshold > 0
    ray.kill(actor)
    assert decider.decide(99, [report(0)], STATE) is None


@pytest.mark.usefixtures("ray_local")
def test_an_answer_that_takes_too_long_is_a_round_without_decision() -> None:
    actor = start_coordinator(POLICY)
    assert ray.get(actor.progress.remote()) == ""
    actor.__ray_call__.remote(lambda coordinator: __import__("time").sleep(1.5))
    assert RemoteDecider(actor, wait_seconds=0.2).decide(1, [report(0)], STATE) is None
    assert RemoteDecider(actor).decide(2, [report(0)], STATE) is not None
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_what_the_coordinator_refuses_is_an_error_not_a_round_without_decision() -> None:
    actor = start_coordinator(POLICY)
    small = dataclasses.replace(STATE, budget_bytes=20_000)
    with pytest.raises(ConfigError, match="smallest possible budget is 20,121 bytes"):
        RemoteDecider(actor).decide(1, [report(0), report(1)], small)
    ray.kill(actor)
