"""What malloc does with memory that is freed: each step frees large tensors, and the next one asks for the same sizes again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of this process instead of giving large ones back to the system, which would hand them out again
    page by page. What the process holds no longer shrinks below the most it needed; the store's own memory, which is not malloc's, does.

    Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_MAX, 0)
