"""What a process imports before it can begin: a run waits for the slowest of its workers."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("fiited_ray.train.worker", {"mlflow", "matplotlib"}),  # rank 0 imports them when it writes
        ("fiited_ray.coordinator", {"mlflow", "matplotlib", "torch", "pandas"}),
        ("fiited_ray.train.plan", {"mlflow", "matplotlib", "torch", "ray"}),  # mistakes are told before those load
    ],
)
def test_a_module_is_imported_without_what_is_not_needed_yet(module: str, unneeded: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unneeded & set(done.stdout.split())
