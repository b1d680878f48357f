"""Nodes that are lost, announced as lost, or new, on a Ray of several: the run goes on from its checkpoint, and MLflow shows nothing of it.

The driver is a process of its own. The head has no CPU, every other node has one, for one worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from failing_runs import Gates, assert_one_run, eventually, gated_driver, gone, newest_step, resumptions, small_config
from ray._private.node import Node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from fiited_ray.config import Config

WITHIN = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head alone."""
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def standing() -> list[Node]:
    """Nodes that are there. A test that takes one away, or adds one, says so here."""
    return []


@pytest.fixture
def nodes(cluster: Cluster, standing: list[Node]) -> list[Node]:
    """Two, for a worker each."""
    while len(standing) < 2:
        standing.append(cluster.add_node(num_cpus=1))
    return standing


@contextmanager
def driver(cluster: Cluster, config: Config, *closed: str, **environment: str) -> Iterator[Gates]:
    """A driver, and the gates of its workers. It has to end well, and soon, when the block is over."""
    with gated_driver(config, *closed, RAY_ADDRESS=cluster.address, **environment) as (process, gates):
        yield gates
        status = process.wait(WITHIN)
    assert status == 0, (gates.folder / "driver.txt").read_text()


def test_a_run_for_one_or_two_workers_goes_on_with_one_when_a_node_leaves_and_with_two_when_one_comes(
    cluster: Cluster, nodes: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, train={"workers": (1, 2), "resize_seconds": 1.0})
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # Ray asks for two at first, for it has not missed the node yet
    with driver(cluster, config, "8-2", "16-1") as gates:
        pids = gates.waiting("8-2", WITHIN)
        eventually(lambda: newest_step(config) == 6, WITHIN, "the checkpoint of step 6 is complete")
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        pids += gates.waiting("16-1", WITHIN)
        eventually(lambda: newest_step(config) == 15, WITHIN, "the checkpoint of step 15 is complete")
        nodes.append(cluster.add_node(num_cpus=1))
    assert_one_run(config)
    assert resumptions(config) == [(6, 1), (15, 2)]
    eventually(lambda: gone(pids), 30, "the processes of earlier attempts are gone")


def test_a_node_that_is_about_to_be_taken_away_makes_a_checkpoint_from_which_training_goes_on_with_a_new_one(
    cluster: Cluster, nodes: list[Node], tmp_path: Path
) -> None:
    config = small_config(tmp_path, checkpoint={"every": 20})
    watching = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with driver(cluster, config, "5-2", "9-2", **watching) as gates:
        pids = gates.waiting("5-2", WITHIN)
        deadline = int(time.time() * 1000) + 600_000
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=cluster.address).drain_node(nodes[-1].node_id, reason, "a test", deadline)
        assert accepted, why
        gates.told("5-2", WITHIN)
        gates.open("5-2")
        gates.waiting("9-2", WITHIN)  # training goes on
        eventually(lambda: newest_step(config) == 6, WITHIN, "there is a checkpoint of step 6, at which the first report came")
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))
        gates.open("9-2")
    assert_one_run(config)
    assert resumptions(config) == [(6, 2)]
    eventually(lambda: gone(pids), 30, "the processes of the first attempt are gone")
