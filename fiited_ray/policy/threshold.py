"""Widths from importance, and the threshold at which the rows meet a number of bytes.

A row with importance s keeps the first w chunks, w = #{j : s > threshold * level_j}, with levels 1, alpha, alpha**2, ... :
chunk j has utility s / alpha**j and stays while that is above the threshold. One level is whole-row pruning (AdaEmbed, OSDI'23).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fiited_ray.policy.histogram import BINS, bin_edges

_HALVINGS = 64


def levels_of(alpha: float, chunks: int) -> tuple[float, ...]:
    """Threshold multiples of the chunks."""
    return tuple(alpha**chunk for chunk in range(chunks))


def width_of(importance: np.ndarray, threshold: float, levels: Sequence[float]) -> np.ndarray:
    """int64 [n]: chunks that rows of float32 [n] importance keep. Threshold 0 keeps everything, unused rows too."""
    if threshold == 0:
        return np.full(len(importance), len(levels))
    cuts = np.asarray([np.float32(threshold * level) for level in levels])
    return (importance[:, None] > cuts).sum(1)


def planned_bytes(rows: np.ndarray, threshold: float, levels: Sequence[float], row_bytes: Sequence[int]) -> float:
    """Bytes of the rows of a histogram at a threshold, spread evenly inside each bin.

    Args:
        rows: int64 [2048], rows by importance bin.
        row_bytes: bytes of a row of width 0 (that is 0), 1, ..., k.
    """
    more = np.diff(np.asarray(row_bytes, np.float64))
    if threshold == 0:
        return float(rows.sum() * more.sum())
    return float(sum(each * _rows_above(rows, threshold * level) for each, level in zip(more, levels, strict=True)))


def find_threshold(rows: np.ndarray, target_bytes: float, levels: Sequence[float], row_bytes: Sequence[int]) -> float:
    """The smallest threshold whose planned bytes are at most the target; 0 when everything fits at full width.

    A float32 value. Bytes are planned as if importance were spread evenly inside a bin (2 % wide): where many rows have exactly the
    same importance the plan may be off by what is in their bin, and the store's own byte limit is what holds.
    """
    if planned_bytes(rows, 0.0, levels, row_bytes) <= target_bytes:
        return 0.0
    edges = bin_edges()
    low, high = edges[1] / 2, edges[-1]
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        if planned_bytes(rows, middle, levels, row_bytes) <= target_bytes:
            high = middle
        else:
            low = middle
    return float(np.nextafter(np.float32(high), np.float32(np.inf)))


def _rows_above(rows: np.ndarray, cut: float) -> float:
    edges = bin_edges()
    if cut >= edges[-1]:
        return 0.0
    at = min(int(np.searchsorted(edges, cut, side="right")) - 1, BINS - 1)
    inside = (edges[at + 1] - cut) / (edges[at + 1] - edges[at])
    return float(rows[at + 1 :].sum()) + float(rows[at]) * inside
