"""The cluster route for real: a head with token authentication, and jobs submitted to it from this checkout."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A head of its own, whose token lies in a home folder of its own."""

    home: Path
    dashboard: str
    environment: dict[str, str] = field(repr=False)

    def submit(self, *entrypoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir .`, waiting for the job's end; `environment` is set for the client alone."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *entrypoint]
        settings = self.environment | environment
        return subprocess.run(command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short: sockets lie below it
        ours = {"RAY_worker_niceness", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in ours}
        environment = kept | {"HOME": folder, "RAY_AUTH_MODE": "token", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        port = free_port()
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
        # Beside another Ray of this machine: no port with a fixed number, no folder in common.
        command += ["--port=0", f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}", "--disable-usage-stats"]
        log = Path(folder) / "head.log"
        with (
            log.open("w") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as head,
        ):
            try:
                assert head.stdout is not None
                started = any("Ray runtime started" in line for line in head.stdout)
                assert started, f"the head did not start: {log.read_text()}"
                yield Cluster(Path(folder), f"http://127.0.0.1:{port}", environment)
            finally:
                head.send_signal(signal.SIGTERM)  # with --block, Ray then ends the processes of this head and no others
                head.communicate()


LOOK = """
import os
import fiited_ray
from fiited_ray.store.ops import ops
print("sources", os.path.relpath(fiited_ray.__file__))
print("kernels", hasattr(ops("cpu"), "pool"))
print("sent", *os.listdir())
"""


@pytest.fixture(scope="module")
def look(cluster: Cluster) -> dict[str, list[str]]:
    """What a job finds: the words behind each first word that it prints."""
    job = cluster.submit("python", "-c", LOOK)
    assert job.returncode == 0, job.stdout
    lines = [line.split() for line in job.stdout.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_job_runs_the_submitted_sources(look: dict[str, list[str]]) -> None:
    assert look["sources"] == [str(Path("fiited_ray", "__init__.py"))]


def test_job_finds_the_installed_kernels(look: dict[str, list[str]]) -> None:
    assert look["kernels"] == ["True"]


def test_job_is_sent_the_project_without_data_runs_or_environment(look: dict[str, list[str]]) -> None:
    assert {"fiited_ray", "jobs", "pyproject.toml"} <= set(look["sent"])
    assert not {".git", ".venv", "data", "runs", "mlflow.db"} & set(look["sent"])


def test_failing_job_fails_the_submission(cluster: Cluster) -> None:
    assert cluster.submit("python", "-c", "raise SystemExit(3)").returncode != 0


@dataclass(frozen=True)
class Submitted:
    """What a submitted training left: by the configuration that a submitted sweep found best, on data that a submitted preparation made."""

    model: Path
    trained: str  # what training printed


@pytest.fixture(scope="module")
def prepared(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    job = cluster.submit("python", "jobs/prepare.py", "synthetic", "--rows", "5000", "--output", f"{folder}/synthetic")
    assert job.returncode == 0, job.stdout
    return folder


@pytest.fixture(scope="module")
def swept(cluster: Cluster, prepared: Path) -> str:
    """What a sweep printed; its runs are in runs.db, its files in runs/swept."""
    data = prepared / "synthetic"
    settings = [f"data.train={data}/train.parquet", f"data.test={data}/test.parquet", f"output={prepared}/runs", "name=swept"]
    settings += ["train.batch_size=256", "train.max_steps=5", f"tracking.uri=sqlite:///{prepared}/runs.db"]
    options = ["--config", "jobs/configs/synthetic.yaml", "--methods", "fiited", "--budgets", "50%"]
    options += ["--baseline", "0.6", "--drop", "0.5"]
    job = cluster.submit("python", "jobs/tune.py", "grid", *options, *settings)
    assert job.returncode == 0, job.stdout
    return job.stdout


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, prepared: Path, swept: str) -> Submitted:
    job = cluster.submit("python", "jobs/train.py", "--config", f"{prepared}/runs/swept/best.yaml")
    assert job.returncode == 0, job.stdout
    (model,) = re.findall(r"^ +model (/.*)$", job.stdout, re.MULTILINE)
    return Submitted(Path(model), job.stdout)


def test_submitted_preparation_writes_all_rows(prepared: Path) -> None:
    assert [pq.read_metadata(prepared / "synthetic" / f"{part}.parquet").num_rows for part in ("train", "test")] == [4500, 500]


def test_submitted_sweep_answers(swept: str) -> None:
    assert "fiited 50%" in swept
    assert "is the smallest within 0.5 AUC of full width" in swept


def test_submitted_training_by_the_sweeps_best_configuration_finishes_in_mlflow(prepared: Path, submitted: Submitted) -> None:
    client = MlflowClient(f"sqlite:///{prepared}/runs.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [
        (name, "FINISHED") for name in ("fiited 50%", "swept", "swept-best")
    ]


def test_submitted_evaluation_scores_the_model_as_training_did(cluster: Cluster, submitted: Submitted) -> None:
    job = cluster.submit("python", "jobs/evaluate.py", "--model", str(submitted.model))
    assert job.returncode == 0, job.stdout
    (quality,) = re.findall(r"AUC [0-9.]+, NE [0-9.]+", job.stdout)
    assert f"quality (test set): {quality}" in submitted.trained


def test_submission_without_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("true", HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
    assert job.returncode != 0
    assert "AuthenticationError: Authentication required" in job.stdout


def test_submission_with_another_token_is_refused(cluster: Cluster) -> None:
    job = cluster.submit("true", RAY_AUTH_TOKEN="not-the-token")
    assert job.returncode != 0
    assert "AuthenticationError: Authentication failed" in job.stdout
