"""jobs/prepare.py from the outside: exit codes, and errors of one line without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
LINE = "\t".join(["1", *map(str, range(13)), *["0000000a"] * 26]) + "\n"


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_synthetic_rows_are_written_and_called_synthetic(tmp_path: Path) -> None:
    done = prepare("synthetic", "--rows", 1000, "--output", tmp_path)
    assert done.returncode == 0
    assert "1,000 synthetic rows" in done.stdout
    assert pq.read_metadata(tmp_path / "train.parquet").num_rows == 900


def test_criteo_text_becomes_two_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(LINE * 20)
    assert prepare("criteo", "--input", tmp_path / "train.txt", "--output", tmp_path / "out").returncode == 0
    assert [pq.read_metadata(tmp_path / "out" / f"{name}.parquet").num_rows for name in ("train", "test")] == [18, 2]


@pytest.mark.parametrize("kind", ["criteo", "avazu"])
def test_a_missing_input_is_one_line_and_exit_code_2(tmp_path: Path, kind: str) -> None:
    done = prepare(kind, "--input", tmp_path / "none.gz", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.gz'}: no such file\n"


def test_too_many_rejected_lines_are_exit_code_2_and_leave_no_output(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(LINE + "nonsense\n")
    done = prepare("criteo", "--input", tmp_path / "train.txt", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "error: 50.00% of the lines are unreadable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("**/*"))
