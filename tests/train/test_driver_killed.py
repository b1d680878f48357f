"""SIGKILL of the driver, which cannot say goodbye: nothing of its Ray is left, and the same job goes on where the last checkpoint is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from failing_runs import ROOT, assert_one_run, config_file, eventually, gated_driver, gone, metric, newest_step, resumptions, small_config

WITHIN = 240.0
GONE_WITHIN = 30.0
AGENTS_GONE_WITHIN = 120.0  # two agents of Ray's look for its dead control service for a minute


def test_a_killed_driver_leaves_no_process_and_its_job_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path)
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
    again = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(config_file(config))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=WITHIN,
    )
    assert again.returncode == 0, again.stderr
    eventually(lambda: gone(agents), AGENTS_GONE_WITHIN, "Ray's agents are gone")
    assert "step 6" in again.stdout
    assert_one_run(config)
    assert resumptions(config) == [(6, 2)]
