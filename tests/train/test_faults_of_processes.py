"""Single processes that die, stop or have no room, on a real Ray: the run goes on by itself, and MLflow shows nothing of it.

One run suffers all of it, one fault after the other: workers die in each phase of a step, before there is any checkpoint, and then come
the faults at the gates. Each wait has an end: `WITHIN` seconds for what takes a few on a machine that has nothing else to do.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gates
import pytest
import ray
from dying import PHASES
from failing_runs import (
    Gates,
    assert_one_run,
    eventually,
    gone,
    log_lines,
    metric,
    newest_step,
    resumptions,
    small_config,
)

from fiited_ray.config import Config
from fiited_ray.train import trainer
from fiited_ray.train.plan import make_plan

WITHIN = 180.0
DEATHS_WITHIN = 600.0  # workers start anew six times
STEPS = 32
DEAD_COORDINATOR, STALL, TOO_LONG, FULL_DISK = GATES = ("8-2", "14-2", "20-2", "26-2")
Resumptions = list[tuple[int, int]]


@dataclass
class Suffered:
    """A finished run, and what was seen of it on the way."""

    config: Config
    deaths: Path  # of workers, one in each phase
    coordinators: list[int] = field(default_factory=list)  # process ids, before and after
    stacks: str = ""  # written while a worker was stopped
    stopped: list[int] = field(default_factory=list)  # process id of the worker that was stopped for too long
    resumptions: dict[str, Resumptions] = field(default_factory=dict)  # those before each gate

    @property
    def stacks_file(self) -> Path:
        return Path(self.config.output, self.config.name, "logs", "stall-00000.txt")


@pytest.fixture(scope="module")
def suffered(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Suffered:
    folder = tmp_path_factory.mktemp("faults")
    train = {"max_steps": STEPS, "epochs": 2, "stall_seconds": 1.0, "timeout_seconds": 30.0}
    seen = Suffered(small_config(folder, train=train, checkpoint={"restarts": 15}), folder / "deaths")
    actors: list[Any] = []
    waiting = Gates(folder / "gates")
    waiting.folder.mkdir()
    seen.deaths.mkdir()

    def faulty() -> None:
        try:
            waiting.waiting(GATES[0], DEATHS_WITHIN)
            for gate, fault in zip(GATES, (kill_coordinator, stall, stop_for_too_long, fill_disk), strict=True):
                pids = waiting.waiting(gate, WITHIN)
                seen.resumptions[gate] = resumptions(seen.config)
                fault(seen, waiting, pids, actors)
        finally:
            for gate in GATES:
                waiting.open(gate)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        start = trainer.start_coordinator
        patch.setattr(trainer, "start_coordinator", lambda *arguments: actors.append(start(*arguments)) or actors[0])
        patch.setattr(trainer.ray.train.torch, "TorchTrainer", gates.gated(waiting.folder, list(GATES), seen.deaths))
        outcome = pool.submit(faulty)
        try:
            trainer.run(make_plan(seen.config), lambda text: None)
        finally:
            outcome.result()  # its error comes first
    return seen


def kill_coordinator(seen: Suffered, waiting: Gates, pids: list[int], actors: list[Any]) -> None:
    seen.coordinators.append(eventually(lambda: pid_of(actors[0]), WITHIN, "the coordinator answers"))
    os.kill(seen.coordinators[0], signal.SIGKILL)
    waiting.open(DEAD_COORDINATOR)


def stall(seen: Suffered, waiting: Gates, pids: list[int], actors: list[Any]) -> None:
    seen.coordinators.append(eventually(lambda: pid_of(actors[0]), WITHIN, "the coordinator is back"))
    stacks = seen.stacks_file
    os.kill(pids[1], signal.SIGSTOP)
    try:
        written = stacks.stat().st_size if stacks.exists() else 0
        waiting.open(STALL)
        eventually(lambda: "all_reduce" in stacks.read_text()[written:] or "all_to_all" in stacks.read_text()[written:], WITHIN, "stacks")
    finally:
        os.kill(pids[1], signal.SIGCONT)
    seen.stacks = stacks.read_text()[written:]


def stop_for_too_long(seen: Suffered, waiting: Gates, pids: list[int], actors: list[Any]) -> None:
    seen.stopped.append(pids[1])
    eventually(lambda: newest_step(seen.config) == 18, WITHIN, "the checkpoint of step 18 is complete")
    os.kill(pids[1], signal.SIGSTOP)
    waiting.open(TOO_LONG)


def fill_disk(seen: Suffered, waiting: Gates, pids: list[int], actors: list[Any]) -> None:
    eventually(lambda: newest_step(seen.config) == 24, WITHIN, "the checkpoint of step 24 is complete")
    resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (32768, 32768))  # of this process alone: the next one has room again
    waiting.open(FULL_DISK)


def pid_of(actor: Any) -> int | None:
    """Its process; None while it does not answer."""
    try:
        found: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=10)
    except ray.exceptions.RayError:
        return None
    return found


def test_one_run_shows_each_step_once(suffered: Suffered) -> None:
    assert_one_run(suffered.config, range(2, STEPS + 1, 2))


def test_a_worker_killed_in_each_phase_costs_no_step(suffered: Suffered) -> None:
    assert {each.name for each in suffered.deaths.iterdir()} == {*PHASES, "checkpoint"}  # each killed a worker


def test_a_killed_coordinator_comes_back_and_no_worker_starts_again(suffered: Suffered) -> None:
    before, after = suffered.coordinators
    assert before != after
    assert suffered.resumptions[STALL] == []
    rounds = metric(suffered.config, "policy/threshold")
    assert min(rounds) <= 8
    assert max(rounds) > 14


def test_a_stopped_worker_has_the_stacks_written_and_no_worker_starts_again(suffered: Suffered) -> None:
    assert "no step for 1 seconds" in suffered.stacks_file.read_text()
    assert "all_reduce" in suffered.stacks or "all_to_all" in suffered.stacks
    assert suffered.resumptions[TOO_LONG] == []


def test_a_worker_stopped_for_too_long_is_replaced_and_training_goes_on_from_the_checkpoint(suffered: Suffered) -> None:
    assert suffered.resumptions[FULL_DISK][0] == (18, 2)
    eventually(lambda: gone(suffered.stopped), 30, "the stopped worker's process is gone")


def test_a_disk_that_is_full_is_named_and_training_goes_on_from_the_checkpoint_when_there_is_room(suffered: Suffered) -> None:
    config = suffered.config
    assert resumptions(config) == [*suffered.resumptions[FULL_DISK], (24, 2)]
    errors = (line["message"] for line in log_lines(config, 1) if line["level"] == "error")
    error = next(each for each in errors if not each.startswith("no step for"))
    assert re.fullmatch(
        rf"the checkpoint of step 27 could not be written: {config.output}/failing/checkpoint_.*/(rows|shard)-00001.*: .*", error
    )
    left = sorted(Path(config.output, config.name).glob("checkpoint_2*"))
    assert len(left) == config.checkpoint.keep
    assert all((each / "manifest.json").exists() for each in left)
