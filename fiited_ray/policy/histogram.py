"""The histogram of importance: 2048 bins, 32 an octave from 2**-44 to 2**20, the same on every shard, so that they add."""

from __future__ import annotations

import numpy as np

BINS = 2048
FIRST = (127 - 44) << 5  # a float32's bits, shifted to keep 5 of the mantissa, at 2**-44
SHIFT = 18


def importance_bin(importance: np.ndarray) -> np.ndarray:
    """Bin numbers, int64 [n], of float32 [n] values >= 0. Straight from the float's bits: linear within an octave."""
    bits = np.ascontiguousarray(importance, np.float32).view(np.int32).astype(np.int64)
    return ((bits >> SHIFT) - FIRST).clip(0, BINS - 1)


def bin_edges() -> np.ndarray:
    """float64 [2049]: bin i holds importance in [edge i, edge i+1). The first edge is 0; the last bin holds all above it, too."""
    bits = ((np.arange(BINS + 1) + FIRST) << SHIFT).astype(np.uint32)
    edges = bits.view(np.float32).astype(np.float64)
    edges[0] = 0.0
    return edges
