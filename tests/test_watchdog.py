"""Stalls: the stacks say where a worker stands, and a process that never goes on ends. Each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading
from pathlib import Path
from fiited_ray.logs import logging_as
from fiited_ray.watchdog import Watchdog

def stands_still():
    threading.Event().wait()

folder = Path(sys.argv[1])
with logging_as(3, lambda: 17, folder), Watchdog(0.3, 3.0, 3, folder) as watchdog:
    watchdog.beat()
    stands_still()
"""


def test_a_worker_that_stands_still_says_where_and_then_ends(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    (line,) = [json.loads(text) for text in (tmp_path / "worker-00003.jsonl").read_text().splitlines()]
    assert (line["rank"], line["step"], line["level"]) == (3, 17, "error")
    assert line["message"].startswith("no step for 0 seconds (train.stall_seconds)")
    assert "in stands_still" in line["stacks"]
    written = (tmp_path / "stall-00003.txt").read_text()
    assert written.count("stands_still") == 2  # at the stall, and by the timer that ended the process
    assert json.loads(done.stderr.splitlines()[0]) == line


GOES_ON = """
import sys, time
from pathlib import Path
from fiited_ray.watchdog import Watchdog
with Watchdog(30.0, 40.0, 0, Path(sys.argv[1])) as watchdog:
    for _ in range(3):
        watchdog.beat()
print("finished")
"""


def test_a_worker_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GOES_ON, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "finished\n")
    assert (tmp_path / "stall-00000.txt").read_text() == ""
