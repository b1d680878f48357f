"""benchmarks/profile.py from the outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_trace_is_in_chromes_format_and_holds_the_phases_of_each_step(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "benchmarks/profile.py", "--trace", trace, "--rows", "3000", "--warmup", "3", "--steps", "4"]
    settings = ["train.batch_size=200", "model.bottom=[8]", "model.top=[8]", "budget=none"]
    settings += [f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(
        [*map(str, command), *settings], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fiited::store_update_pooled" in done.stdout
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 for event in events)
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in ("route", "gather", "backward", "update"):
        assert names.count(phase) == 4, phase
    assert {"data", "model"} <= set(names)
