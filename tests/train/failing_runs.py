"""Small runs for the tests of failures: their configuration, what MLflow shows of them, and waiting with an end."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import psutil
import yaml

from fiited_ray.checkpoint import Folder, newest
from fiited_ray.config import (
    Budget,
    CheckpointConfig,
    Config,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PolicyConfig,
    TrackingConfig,
    TrainConfig,
)
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic

ROOT = Path(__file__).parent.parent.parent
STEPS = 24
EVERY = 3  # steps between checkpoints
LOGGED = list(range(2, STEPS + 1, 2))
Found = TypeVar("Found")


def small_config(folder: Path, name: str = "failing", **groups: dict[str, Any]) -> Config:
    """Two workers, 24 steps, a round every fourth, everything in `folder`; `groups` change keys, such as checkpoint={"every": 5}."""
    train, _ = write_synthetic(folder, SyntheticSpec(rows=STEPS * 256 + 1000))
    made = Config(
        data=DataConfig(train=(str(train),), dense=("d0",), categorical=("c0", "c2", "c5")),
        name=name,
        budget=Budget(bytes=1_000_000),
        output=str(folder / "runs"),
        embedding=EmbeddingConfig(dim=8, chunk=4),
        policy=PolicyConfig(interval=4, first_round=2),
        model=ModelConfig(bottom=(8,), top=(8,)),
        train=TrainConfig(workers=2, batch_size=256, max_steps=STEPS, progressive=True, timeout_seconds=120.0, debug=True),
        checkpoint=CheckpointConfig(every=EVERY, restarts=10),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", log_every=2, log_model=False),
    )
    return dataclasses.replace(made, **{group: dataclasses.replace(getattr(made, group), **keys) for group, keys in groups.items()})


def assert_one_run(config: Config, steps: Sequence[int] = LOGGED) -> None:
    """MLflow shows one run, finished, with each of the steps once and in order."""
    client = mlflow.MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "bytes/total"):
        assert metric(config, name) == list(steps)


def metric(config: Config, name: str) -> list[int]:
    """Steps at which the only run has a value of it."""
    client = mlflow.MlflowClient(config.tracking.uri)
    (run,) = client.search_runs(["1"])
    return [each.step for each in client.get_metric_history(run.info.run_id, name)]


def newest_step(config: Config) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    saved = newest(Folder.of(Path(config.output) / config.name))
    return 0 if saved is None else saved.step


def log_lines(config: Config, rank: int = 0) -> list[dict[str, Any]]:
    """What a worker logged, in all attempts."""
    path = Path(config.output) / config.name / "logs" / f"worker-{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def resumptions(config: Config) -> list[tuple[int, int]]:
    """Step and number of workers of each attempt that went on from a checkpoint, as the log has them."""
    texts = [line["message"] for line in log_lines(config) if line["message"].startswith("goes on from ")]
    return [(int(text.split(", step ")[1].split(",")[0]), int(text.split("with ")[1].split(" ")[0])) for text in texts]


def eventually(condition: Callable[[], Found], seconds: float, what: str) -> Found:
    """What the condition gives once it is true.

    Raises:
        TimeoutError: when it does not become true for so long.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)
    return found


class Gates:
    """The test's side of `gates`: who waits where, and opening."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def waiting(self, gate: str, seconds: float) -> list[int]:
        """Process ids of all workers, by rank, once they wait at a gate such as "8-2": after step 8, when there are two."""
        paths = [self.folder / f"at-{gate}-{rank}" for rank in range(int(gate.split("-")[1]))]
        eventually(lambda: all(path.exists() for path in paths), seconds, f"all workers wait at {gate}")
        return [int(path.read_text()) for path in paths]

    def told(self, gate: str, seconds: float) -> None:
        """Wait until rank 0, which waits there, knows that a node is about to be taken away."""
        eventually((self.folder / f"told-{gate}-0").exists, seconds, "rank 0 knows")

    def open(self, gate: str) -> None:
        (self.folder / f"open-{gate}").touch()


@contextmanager
def gated_driver(config: Config, *closed: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Gates]]:
    """A driver in a process of its own, and the gates of its workers; what it says goes to driver.txt beside them. Killed at the end."""
    folder = Path(config.output).parent
    gates = Gates(folder / "gates")
    gates.folder.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("gates.py")), str(config_file(config)), str(gates.folder), *closed]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with (
        (gates.folder / "driver.txt").open("w") as output,
        subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            yield process, gates
        finally:
            process.kill()


def config_file(config: Config) -> Path:
    """The configuration as a file beside its output, which it names relative to there."""
    output = Path(config.output)
    path = output.parent / "config.yaml"
    path.write_text(yaml.safe_dump(dataclasses.replace(config, output=output.name).to_dict()))
    return path


def gone(pids: Iterable[int]) -> bool:
    """Whether none of the processes is there any more."""
    return not any(psutil.pid_exists(pid) for pid in pids)
