"""MLflow away for a while, on a real server: no step waits, none is lost, none comes twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from fiited_ray import tracking
from fiited_ray.config import Config, DataConfig, TrackingConfig
from fiited_ray.run_writer import RunWriter
from fiited_ray.tracking_address import RunRef


class Server:
    """An MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder}/runs.db"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._command += ["--backend-store-uri", self.store, "--default-artifact-root", str(folder / "artifacts")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while True:
            assert self._process.poll() is None, "the server did not start"
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # eight processes for what no run asks of it
    found = Server(tmp_path)
    yield found
    found.kill()


def steps(store: str, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in mlflow.MlflowClient(store).get_metric_history(run_id, name)]


def make_run(uri: str) -> RunRef:
    return tracking.create_run(Config(data=DataConfig(categorical=("a", "b")), tracking=TrackingConfig(uri=uri)), {})


def test_what_is_logged_while_the_server_is_away_arrives_when_it_is_back_once_each(server: Server, tmp_path: Path) -> None:
    ref = make_run(server.store)
    away = RunRef(server.uri, ref.experiment_id, ref.run_id)
    journal = tmp_path / "journal.jsonl"
    writer = RunWriter(away, patience_seconds=120, journal=journal)
    for step in range(1, 6):
        writer.metrics(step, {"train/loss": step / 2, "train/auc": float("nan")})  # nobody is there yet
    assert len(journal.read_text().splitlines()) == 5
    server.start()
    writer.close()
    assert steps(server.store, ref.run_id) == [(step, step / 2) for step in range(1, 6)]
    assert journal.read_text() == ""


def test_a_writer_that_died_with_the_store_away_leaves_its_metrics_to_the_next(tmp_path: Path) -> None:
    ref = make_run(f"sqlite:///{tmp_path}/runs.db")
    journal = tmp_path / "journal.jsonl"
    entry = {"run": ref.run_id, "time": 1, "step": 3, "values": {"train/loss": 0.3}}
    foreign = entry | {"run": "other", "step": 9}
    journal.write_text(json.dumps(entry) + "\n" + json.dumps(foreign) + "\n" + '{"run": "cut o')
    writer = RunWriter(ref, journal=journal)
    writer.metrics(4, {"train/loss": 0.4})
    writer.close()
    assert steps(ref.uri, ref.run_id) == [(3, 0.3), (4, 0.4)]


def test_steps_that_a_resumed_run_makes_anew_are_not_logged_twice(tmp_path: Path) -> None:
    ref = make_run(f"sqlite:///{tmp_path}/runs.db")
    for begin, value in ((1, 0.5), (2, 0.7)):  # the second goes on from a checkpoint of step 1
        writer = RunWriter(ref)
        for step in range(begin, begin + 3):
            writer.metrics(step, {"train/loss": value})
        writer.close()
    assert steps(ref.uri, ref.run_id) == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.7)]


def test_a_run_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    ref = make_run(f"sqlite:///{tmp_path}/runs.db")
    writer = RunWriter(RunRef(ref.uri, ref.experiment_id, "no-such-run"), journal=tmp_path / "journal.jsonl")
    writer.metrics(1, {"train/loss": 0.5})
    with pytest.raises(RuntimeError, match=r"no-such-run.*what it lacks lies in .*journal\.jsonl"):
        writer.close()


def test_a_journal_that_cannot_be_written_costs_no_step(tmp_path: Path) -> None:
    ref = make_run(f"sqlite:///{tmp_path}/runs.db")
    writer = RunWriter(ref, journal=tmp_path / "no folder" / "journal.jsonl")
    for step in (1, 2):
        writer.metrics(step, {"train/loss": 0.5})
    writer.close()
    assert steps(ref.uri, ref.run_id) == [(1, 0.5), (2, 0.5)]
