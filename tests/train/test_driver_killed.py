"""A driver that is killed, and one told to end: nothing of its Ray is left, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
from failing_runs import ROOT, assert_one_run, config_file, eventually, gated_driver, gone, metric, newest_step, resumptions, small_config

WITHIN = 240.0
GONE_WITHIN = 30.0
AGENTS_GONE_WITHIN = 120.0  # two agents of Ray's look for its dead control service for a minute


def test_a_killed_driver_leaves_no_process_one_told_to_end_saves_and_the_same_command_goes_on_with_the_same_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"max_steps": None, "epochs": 40})
    with gated_driver(config, "8-2") as (process, gates):
        workers = gates.waiting("8-2", WITHIN)
        eventually(lambda: newest_step(config) == 6, WITHIN, "the checkpoint of step 6 is complete")
        eventually(lambda: metric(config, "train/loss")[-1:] == [8], WITHIN, "MLflow has more than the checkpoint")
        children = psutil.Process(process.pid).children(recursive=True)
        agents = {each.pid for each in children if "".join(each.cmdline()).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))}
        others = {each.pid for each in children} - agents
        assert others.issuperset(workers)
        process.kill()
        process.wait()
        eventually(lambda: gone(others), GONE_WITHIN, "its raylet, workers and all others are gone")
    listed = Path(config.output, config.name, "checkpoint_manager_snapshot.json")
    listed.write_text('{"ray_version": ')  # Ray writes it in place, some time after a checkpoint: it may have been in the middle

    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(config_file(config))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # without checkpoints of its own but the one that the signal asks for
    with subprocess.Popen([*command, "checkpoint.every=null"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        said = []
        for line in job.stdout:
            said.append(line)
            if line.startswith("step "):
                job.send_signal(signal.SIGTERM)
                break
        said.append(job.stdout.read())
    assert job.returncode == 128 + signal.SIGTERM
    assert "step 6" in "".join(said)
    assert "the same command goes on from there" in said[-1]
    client = mlflow.MlflowClient(config.tracking.uri)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    stopped = newest_step(config)
    assert stopped > 8

    command.append(f"train.max_steps={stopped + 20}")
    more = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=WITHIN)
    assert more.returncode == 0, more.stderr
    assert_one_run(config, [*range(2, stopped + 20, 2), stopped + 20])
    assert resumptions(config) == [(6, 2), (stopped, 2)]
    eventually(lambda: gone(agents), AGENTS_GONE_WITHIN, "Ray's agents are gone")
