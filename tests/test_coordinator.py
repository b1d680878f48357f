"""The coordinator actor on a real Ray."""

from __future__ import annotations

import dataclasses
import time

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
    assert alive(actor)  # its process takes longer to start than a round waits, on a busy machine
    decider = RemoteDecider(actor, 0, wait_seconds=5)
    assert decider.decide(1, report(0), STATE) is not None
    ray.kill(actor, no_restart=False)
    answers = (decider.decide(number, report(0), STATE) for number in range(2, 1000))
    assert next(answer for answer in answers if answer is not None).threshold > 0
    ray.kill(actor)
    assert decider.decide(99, report(0), STATE) is None


@pytest.mark.usefixtures("ray_local")
def test_three_shards_go_on_with_the_round_after_the_actor_died() -> None:
    actor = start_coordinator(POLICY, 3, wait_seconds=60)
    assert None not in ray.get(send(actor, 1, range(3)))
    waiting = send(actor, 2, range(2))
    ray.kill(actor, no_restart=False)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(waiting)
    while not alive(actor):
        time.sleep(0.05)
    assert ray.get(send(actor, 3, range(3))) == [decide([report(rank) for rank in range(3)], STATE, POLICY)] * 3
    ray.kill(actor)


def alive(actor: ray.actor.ActorHandle) -> bool:
    try:
        return ray.get(actor.progress.remote()) == ""
    except ray.exceptions.RayActorError:
        return False


@pytest.mark.usefixtures("ray_local")
def test_a_late_report_gets_the_same_decision_and_one_of_a_forgotten_round_none() -> None:
    actor = start_coordinator(POLICY, 2)
    for number in range(1, 6):
        first = ray.get(send(actor, number, range(2)))[0]
    assert ray.get(send(actor, 5, range(1))) == [first]
    assert ray.get(send(actor, 1, range(1))) == [None]
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_who_comes_when_the_wait_is_over_is_not_decided_for_alone() -> None:
    actor = start_coordinator(POLICY, 2, wait_seconds=0.3)
    assert ray.get(send(actor, 1, range(1))) == [None]
    assert ray.get(send(actor, 1, range(1, 2))) == [None]
    assert ray.get(actor.telemetry.remote()) == []
    ray.kill(actor)


def refused(actor: ray.actor.ActorHandle, calls: list, match: str) -> None:
    """Every shard of the round is told, none waits for the time-out."""
    for call in calls:
        with pytest.raises(ValueError, match=match):
            ray.get(call)
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_a_rank_that_says_two_things_is_an_error_on_every_shard() -> None:
    actor = start_coordinator(POLICY, 3)
    calls = send(actor, 1, range(2))
    refused(actor, [*calls, actor.decide.remote(1, 1, report(7), STATE)], "round 1: rank 1 reported twice")


@pytest.mark.usefixtures("ray_local")
def test_a_rank_that_repeats_itself_is_heard_once() -> None:
    actor = start_coordinator(POLICY, 2)
    calls = send(actor, 1, range(1)) + send(actor, 1, range(2))
    assert ray.get(calls) == [decide([report(0), report(1)], STATE, POLICY)] * 3
    ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_shards_that_differ_in_what_is_common_are_an_error_on_every_shard() -> None:
    actor = start_coordinator(POLICY, 2)
    calls = send(actor, 1, range(1))
    other = dataclasses.replace(STATE, budget_bytes=1)
    refused(actor, [*calls, actor.decide.remote(1, 1, report(1), other)], r"round 1: rank [01] has RoundState")


@pytest.mark.usefixtures("ray_local")
def test_a_budget_too_small_is_an_error_on_every_shard() -> None:
    actor = start_coordinator(POLICY, 2)
    small = dataclasses.replace(STATE, budget_bytes=20_000)
    calls = [actor.decide.remote(1, rank, report(rank), small) for rank in range(2)]
    refused(actor, calls, "smallest possible budget is 20,120 bytes")


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
    state = dataclasses.replace(STATE, budget_bytes=1000 * 15_000)
    decisions = ray.get([actor.decide.remote(1, rank, mine, state) for rank in range(1000)])
    assert len({each.threshold for each in decisions}) == 1
    ray.kill(actor)


def test_a_single_process_decides_for_itself() -> None:
    assert LocalDecider(POLICY).decide(1, report(0), STATE) == decide([report(0)], STATE, POLICY)
