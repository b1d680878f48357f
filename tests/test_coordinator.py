"""The coordinator actor on a real Ray."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from fiited_ray.config import PolicyConfig
from fiited_ray.coordinator import LocalDecider, RemoteDecider, start_coordinator
from fiited_ray.policy import BINS, RoundState, ShardReport, decide

POLICY = PolicyConfig()
STATE = RoundState(200_000, 0.0, (1.0, 4.0), (0, 60, 100))


def report(seed: int, rows: int = 2000) -> ShardReport:
    counts = np.bincount(np.random.default_rng(seed).integers(500, 1500, rows), minlength=BINS)
    return ShardReport(np.stack([counts, counts * 100]), 10_000)


def send(actor: ray.actor.ActorHandle, number: int, ranks: range) -> list:
    return [actor.decide.remote(number, rank, report(rank), STATE) for rank in ranks]


@pytest.mark.usefixtures("ray_local")
def test_all_shards_get_the_decision_of_the_pure_function() -> None:
    actor = start_coordinator(POLICY, 3)
    expected = decide([report(rank) for rank in range(3)], STATE, POLICY)
    assert ray.get(send(actor, 1, range(3))) == [expected] * 3
    assert [each["round"] for each in ray.get(actor.telemetry.remote())] == [1]
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_a_missing_shard_ends_the_round_without_a_decision() -> None:
    actor = start_coordinator(POLICY, 3, wait_seconds=0.3)
    assert ray.get(send(actor, 1, range(2))) == [None, None]
    assert ray.get(send(actor, 2, range(3)))[0] is not None
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_after_the_actor_dies_the_next_rounds_proceed_and_nobody_hangs() -> None:
    actor = start_coordinator(POLICY, 1, wait_seconds=5)
    decider = RemoteDecider(actor, 0, wait_seconds=5)
    assert decider.decide(1, report(0), STATE) is not None
    ray.kill(actor, no_restart=False)
    answers = (decider.decide(number, report(0), STATE) for number in range(2, 1000))
    assert next(answer for answer in answers if answer is not None).threshold > 0
    ray.kill(actor)
    assert decider.decide(99, report(0), STATE) is None


@pytest.mark.usefixtures("ray_local")
def test_a_rank_that_cannot_be_is_an_error_not_a_wait() -> None:
    actor = start_coordinator(POLICY, 2)
    with pytest.raises(ValueError, match="rank 7 reported, but there are 2 workers"):
        RemoteDecider(actor, 7).decide(1, report(0), STATE)
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_a_thousand_shards_are_decided() -> None:
    actor = start_coordinator(POLICY, 1000)
    mine = ray.put(report(0, 100))
    decisions = ray.get([actor.decide.remote(1, rank, mine, STATE) for rank in range(1000)])
    assert len({each.threshold for each in decisions}) == 1
    ray.kill(actor)


def test_a_single_process_decides_for_itself() -> None:
    assert LocalDecider(POLICY).decide(1, report(0), STATE) == decide([report(0)], STATE, POLICY)
