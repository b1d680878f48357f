"""Twenty seconds of coverage-guided fuzzing of the reader of checkpoints find nothing but clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_whatever_stands_in_a_checkpoint_loads_or_is_refused_clearly(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; it comes with the dev requirements on Linux")
    script = Path(__file__).parent / "fuzz_reader.py"
    options = ["-max_total_time=20", "-rss_limit_mb=4096", "-max_len=20000", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([sys.executable, script, tmp_path / "corpus", *options], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "Done" in done.stderr
