"""`keep_freed_memory`: the pages of a tensor that has been freed are there for the next one. In a process of its own, for it lasts."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource, sys, torch
from fiited_ray.allocator import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages (PR_SET_THP_DISABLE), whatever this machine gives unasked
if "keep" in sys.argv:
    keep_freed_memory()
def touch():
    torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
for _ in range(20):  # small blocks find their places between the large ones
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_pages_are_taken_once():
    def faults(*arguments: str) -> int:
        return int(subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], check=True, capture_output=True, text=True).stdout)

    pages = 48 * 256
    assert faults() > 5 * pages  # what it is against
    assert faults("keep") < pages // 2
