"""A finished sweep, made by the job itself, whose driver was killed in the middle and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Sweep:
    """A sweep's files, and what its two drivers printed."""

    folder: Path
    config: Path
    killed: str
    resumed: str

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def output(self) -> Path:
        return self.folder / "runs" / "sweep"


def small_config(folder: Path, train: Path, test: Path) -> Path:
    """A configuration of seconds."""
    tree = {
        "name": "sweep",
        "output": str(folder / "runs"),
        "data": {
            "train": str(train),
            "test": str(test),
            "dense": ["d0", "d1"],
            "categorical": [f"c{at}" for at in range(25)],
            "multi_hot": ["c25"],
        },
        "embedding": {"dim": 8, "chunk": 4},
        "model": {"bottom": [8], "top": [8]},
        "checkpoint": {"restarts": 0},
        "train": {"workers": 1, "batch_size": 500},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "log_every": 4, "system_every": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Training and test file."""
    return write_synthetic(tmp_path_factory.mktemp("clicks"), SyntheticSpec(rows=8000))


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory, synthetic: tuple[Path, Path]) -> Sweep:
    """`target` on the smallest ladder; its driver gets SIGKILL once the baseline is trained and the next trial has begun."""
    folder = tmp_path_factory.mktemp("sweep")
    config = small_config(folder, *synthetic)
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "target", "--config", str(config)]
    command += ["--least", "50%", "--precision", "1.9", "--drop", "0.5"]
    killed = run(command, folder, kill_at="fiited 50%")
    return Sweep(folder, config, killed, run(command, folder))


def run(command: Sequence[str], folder: Path, kill_at: str | None = None) -> str:
    """Run a job to its end, or kill it hard when a line holds some words; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    lines = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if kill_at and kill_at in line:
                job.send_signal(signal.SIGKILL)
                break
    if kill_at is None:
        assert job.returncode == 0, "".join(lines)
    else:
        assert job.returncode == -signal.SIGKILL, "".join(lines)
    return "".join(lines)
