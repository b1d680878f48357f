"""Single processes that die, stop or have no room, on a real Ray: the run goes on by itself, and MLflow shows nothing of it.

Each wait has an end: `WITHIN` seconds for what takes a few on a machine that has nothing else to do.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gates
import pytest
import ray
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

pytestmark = pytest.mark.usefixtures("ray_local")


def run_with(config: Config, closed: list[str], fault: Callable[[Gates], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train while `fault` runs in a thread; its error comes first. A gate that it leaves closed by failing is opened."""
    folder.mkdir()
    monkeypatch.setattr(trainer.ray.train.torch, "TorchTrainer", gates.gated(folder, closed))

    def faulty() -> None:
        try:
            fault(Gates(folder))
        finally:
            for gate in closed:
                Gates(folder).open(gate)

    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(faulty)
        try:
            trainer.run(make_plan(config), lambda text: None)
        finally:
            outcome.result()


def test_a_killed_coordinator_comes_back_and_a_stopped_worker_has_the_stacks_written_and_no_worker_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, train={"stall_seconds": 1.0})
    stacks = Path(config.output, config.name, "logs", "stall-00000.txt")
    actors: list[Any] = []
    start = trainer.start_coordinator
    monkeypatch.setattr(trainer, "start_coordinator", lambda *arguments: actors.append(start(*arguments)) or actors[0])

    def pid() -> int | None:
        try:
            found: int = ray.get(actors[0].__ray_call__.remote(lambda self: os.getpid()), timeout=10)
        except ray.exceptions.RayError:
            return None
        return found

    def fault(waiting: Gates) -> None:
        waiting.waiting("8-2", WITHIN)
        before = eventually(pid, WITHIN, "the coordinator answers")
        os.kill(before, signal.SIGKILL)
        waiting.open("8-2")
        _, stopped = waiting.waiting("16-2", WITHIN)
        after = eventually(pid, WITHIN, "the coordinator is back")
        assert after != before
        os.kill(stopped, signal.SIGSTOP)
        try:
            written = stacks.stat().st_size if stacks.exists() else 0
            waiting.open("16-2")
            eventually(
                lambda: "all_reduce" in stacks.read_text()[written:] or "all_to_all" in stacks.read_text()[written:], WITHIN, "stacks"
            )
        finally:
            os.kill(stopped, signal.SIGCONT)

    run_with(config, ["8-2", "16-2"], fault, tmp_path / "gates", monkeypatch)
    assert_one_run(config)
    assert resumptions(config) == []
    rounds = metric(config, "policy/threshold")
    assert min(rounds) <= 8
    assert max(rounds) > 16
    assert "no step for 1 seconds" in stacks.read_text()


def test_a_worker_stopped_for_too_long_is_replaced_and_training_goes_on_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, train={"stall_seconds": 1.0, "timeout_seconds": 10.0})
    stopped: list[int] = []

    def fault(waiting: Gates) -> None:
        stopped.append(waiting.waiting("8-2", WITHIN)[1])
        eventually(lambda: newest_step(config) == 6, WITHIN, "the checkpoint of step 6 is complete")
        os.kill(stopped[0], signal.SIGSTOP)
        waiting.open("8-2")

    run_with(config, ["8-2"], fault, tmp_path / "gates", monkeypatch)
    assert_one_run(config)
    assert resumptions(config)[0] == (6, 2)
    eventually(lambda: gone(stopped), 30, "the stopped worker's process is gone")


def test_a_disk_that_is_full_is_named_and_training_goes_on_from_the_checkpoint_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)

    def fault(waiting: Gates) -> None:
        _, pid = waiting.waiting("8-2", WITHIN)
        eventually(lambda: newest_step(config) == 6, WITHIN, "the checkpoint of step 6 is complete")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (32768, 32768))  # of this process alone: the next one has room again
        waiting.open("8-2")

    run_with(config, ["8-2"], fault, tmp_path / "gates", monkeypatch)
    assert_one_run(config)
    assert resumptions(config) == [(6, 2)]
    error = next(line["message"] for line in log_lines(config, 1) if line["level"] == "error")
    assert re.fullmatch(
        rf"the checkpoint of step 9 could not be written: {config.output}/failing/checkpoint_.*/(rows|shard)-00001.*: .*", error
    )
    left = sorted(Path(config.output, config.name).glob("checkpoint_2*"))
    assert len(left) == config.checkpoint.keep
    assert all((each / "manifest.json").exists() for each in left)
