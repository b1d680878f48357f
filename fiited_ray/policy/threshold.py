"""Widths from importance, and the threshold at which the rows meet a number of bytes.

A row with importance s keeps the first w chunks, w = #{j : s > threshold * level_j}, with levels 1, alpha, alpha**2, ... :
chunk j has utility s / alpha**j and stays while that is above the threshold. One level is whole-row pruning (AdaEmbed, OSDI'23).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fiited_ray.policy.histogram import BINS, FIRST, SHIFT

_HIGHEST = 2.0**100  # a cut that no importance passes
_HEAP_SHARE = 0.01  # of the target: what the heaps that are not seen as such may hold, over all levels
_HEAP_FACTOR = 2  # times as many rows as in the bins around
_AROUND = 4  # bins on each side
_TRIED = 64  # thresholds at a time


def levels_of(alpha: float, chunks: int) -> tuple[float, ...]:
    """Threshold multiples of the chunks."""
    return tuple(alpha**chunk for chunk in range(chunks))


def width_of(importance: np.ndarray, threshold: float, levels: Sequence[float]) -> np.ndarray:
    """int64 [n]: chunks that rows of float32 [n] importance keep. Threshold 0 keeps everything, unused rows too."""
    if threshold == 0:
        return np.full(len(importance), len(levels), np.int64)
    return np.asarray((importance[:, None] > _cuts(threshold, np.asarray(levels))).sum(1), np.int64)


def planned_bytes(rows: np.ndarray, threshold: float, levels: Sequence[float], row_bytes: Sequence[int]) -> float:
    """Bytes of the rows of a histogram at a threshold, spread evenly inside each bin.

    The first and the last bin, which have no such width, count whole unless they lie below the cut.

    Args:
        rows: int64 [2048], rows by importance bin.
        row_bytes: bytes of a row of width 0 (that is 0), 1, ..., k.
    """
    plan = _Plan(rows, levels, row_bytes)
    return plan.all_bytes if threshold == 0 else float(plan.bytes_at(np.array([threshold]))[0])


def find_threshold(rows: np.ndarray, target_bytes: float, levels: Sequence[float], row_bytes: Sequence[int]) -> float:
    """The smallest float32 threshold whose planned bytes are at most the target; 0 when everything fits at full width.

    A plan that spreads a bin's rows over its width (2 %) is wrong where many have the very same importance. A bin much fuller than
    those around it, and worth more than a small share of the target, is therefore kept whole or left out whole: out when it does not
    fit. The rows then take at most 1.01 times the target, but for how unevenly the other bins with a cut in them, one for each
    level, are filled. A larger target never gives a higher threshold. The limits of the store hold in any case.
    """
    plan = _Plan(rows, levels, row_bytes)
    if plan.all_bytes <= target_bytes:
        return 0.0
    plan.keep_heaps_whole(target_bytes)
    low, high = 0, int(np.float32(_HIGHEST).view(np.int32))  # positive floats are in the order of their bits
    while high - low > 1:  # low is too low, high is high enough
        step = -(-(high - low) // _TRIED)
        between = np.arange(low + step, high, step)
        too_low = int((plan.bytes_at(_floats(between)) > target_bytes).sum())
        low, high = low + too_low * step, min(high, low + (too_low + 1) * step)
    return float(_floats(np.array([high]))[0])


class _Plan:
    """Bytes of a histogram's rows as a function of the threshold; never rising with it."""

    def __init__(self, rows: np.ndarray, levels: Sequence[float], row_bytes: Sequence[int]) -> None:
        self._rows = rows.astype(np.float64)
        self._above = np.append(self._rows[::-1].cumsum()[::-1], 0.0)  # rows in this bin and higher ones
        self._levels = np.asarray(levels, np.float64)
        self._more = np.diff(np.asarray(row_bytes, np.float64))  # bytes of the next chunk
        self._whole = np.zeros((len(self._levels), BINS), bool)
        self._whole[:, [0, -1]] = True

    def keep_heaps_whole(self, target_bytes: float) -> None:
        """Count a bin with many equal rows as kept until the cut has left it behind."""
        heavy = self._rows * self._more[:, None] * len(self._levels) > _HEAP_SHARE * target_bytes
        bins = np.flatnonzero(heavy.any(axis=0))
        around = np.pad(self._rows, _AROUND)[bins[:, None] + np.arange(2 * _AROUND + 1)]
        heaped = self._rows[bins] > _HEAP_FACTOR * np.median(around, 1)
        self._whole[:, bins] |= heaped & heavy[:, bins]

    @property
    def all_bytes(self) -> float:
        """At threshold 0."""
        return float(self._above[0] * self._more.sum())

    def bytes_at(self, thresholds: np.ndarray) -> np.ndarray:
        """float64 [n], of float64 [n] thresholds above 0."""
        cuts = _cuts(thresholds[:, None], self._levels)
        least_kept = cuts.view(np.int32).astype(np.int64) + 1  # the next float above the cut
        bins = ((least_kept >> SHIFT) - FIRST).clip(0, BINS - 1)
        inside = 1 - (least_kept & ((1 << SHIFT) - 1)) / (1 << SHIFT)
        inside[self._whole[np.arange(len(self._levels)), bins]] = 1.0
        kept = self._above[bins + 1] + self._rows[bins] * inside
        return np.asarray((self._more * np.where(cuts < _HIGHEST, kept, 0.0)).sum(1))


def _cuts(threshold: float | np.ndarray, levels: np.ndarray) -> np.ndarray:
    """float32 [k], or [n, k] of thresholds [n, 1]: a chunk stays with rows above its cut. Rounded as the store rounds them."""
    return np.minimum(threshold * levels, _HIGHEST).astype(np.float32)


def _floats(bits: np.ndarray) -> np.ndarray:
    """float64, of the bits of float32 numbers."""
    return bits.astype(np.int32).view(np.float32).astype(np.float64)
