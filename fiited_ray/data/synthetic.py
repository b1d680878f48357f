"""Synthetic click logs in the shape of Criteo's: 13 dense and 26 categorical columns, power-law ids, planted signal, drift.

Everything is drawn from a seed; nothing of any real data set is in it but the published numbers of distinct values by column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fiited_ray.data.errors import DataError
from fiited_ray.data.files import SYNTHETIC_KEY
from fiited_ray.data.writer import SplitWriter

DENSE = 13
CATEGORICAL = 26  # the last one is multi-hot
# Distinct values of C1..C26 in the Criteo Kaggle training data (45,840,617 rows), as the DLRM repository lists them.
CARDINALITIES = (
    1460,
    583,
    10131227,
    2202608,
    305,
    24,
    12517,
    633,
    3,
    93145,
    5683,
    8351593,
    3194,
    27,
    14992,
    5461306,
    10,
    5652,
    2173,
    4,
    7046547,
    18,
    15,
    286181,
    105,
    142572,
)
_CRITEO_ROWS = 45_840_617
_LATENT = 4  # dimensions of the hidden preferences
_BLOCK = 50_000


@dataclass(frozen=True)
class SyntheticSpec:
    """How much, and how it drifts."""

    rows: int = 800_000
    test_share: float = 0.1  # the last rows
    seed: int = 0
    skew: float = 1.1  # exponent of the power law over ids
    drift: float = 0.5  # of popularity: how often a rank of a column's popularity order goes to a new id from first to last row, on average
    preference_drift: float = 0.0  # of what ids mean for the label: quarter turns from first to last row; after one nothing is left of it
    click_rate: float = 0.25

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("rows", self.rows > 0, "above 0"),
            ("seed", self.seed >= 0, "at least 0"),
            ("test_share", 0 <= self.test_share < 1, "at least 0 and below 1"),
            ("skew", self.skew >= 0, "at least 0"),
            ("drift", self.drift >= 0, "at least 0"),
            ("preference_drift", self.preference_drift >= 0, "at least 0"),
            ("click_rate", 0 < self.click_rate < 1, "between 0 and 1"),
        ):
            if not fits:
                raise DataError(f"synthetic data: {name} must be {wanted}, not {getattr(self, name)}")

    def cardinality(self, column: int) -> int:
        """Published distinct values, scaled with the rows; small columns keep theirs."""
        return max(min(CARDINALITIES[column], 100), int(CARDINALITIES[column] * min(1.0, self.rows / _CRITEO_ROWS * 2)))


def write_synthetic(folder: Path, spec: SyntheticSpec, group_rows: int | None = None) -> tuple[Path, ...]:
    """Write train.parquet and test.parquet in time order, or nothing at all; memory stays that of one block.

    Args:
        group_rows: most rows of a row group; None: those of a block.

    Returns:
        the paths of what was written: a set of no rows is not.

    Raises:
        DataError: when the folder cannot be written, or already holds one of them.
    """
    train_rows = int(spec.rows * (1 - spec.test_share))
    with SplitWriter(folder, part_rows=max(train_rows, spec.rows - train_rows), group_rows=group_rows) as writer:
        for table in _blocks(spec):
            writer.write(table)
        return tuple(writer.publish(train_rows))


def _schema() -> pa.Schema:
    fields = [pa.field("label", pa.int8()), pa.field("time", pa.int64())]
    fields += [pa.field(f"d{at}", pa.float32()) for at in range(DENSE)]
    fields += [pa.field(f"c{at}", pa.int64()) for at in range(CATEGORICAL - 1)]
    fields += [pa.field(f"c{CATEGORICAL - 1}", pa.list_(pa.int64()))]
    return pa.schema(fields, metadata={SYNTHETIC_KEY: b"made by jobs/prepare.py synthetic"})


def _blocks(spec: SyntheticSpec) -> Iterator[pa.Table]:
    random = np.random.default_rng(spec.seed)
    loadings = random.normal(size=(CATEGORICAL, _LATENT)) / np.sqrt(_LATENT)
    dense_loadings = random.normal(size=(DENSE, _LATENT)) / np.sqrt(_LATENT)
    for begin in range(0, spec.rows, _BLOCK):
        rows = min(_BLOCK, spec.rows - begin)
        block = np.random.default_rng((spec.seed, begin))
        progress = (begin + np.arange(rows)) / spec.rows
        columns: dict[str, pa.Array] = {}
        score = np.zeros(rows)
        taste = np.zeros((rows, _LATENT))
        for at in range(CATEGORICAL - 1):
            ids = _draw_ids(block, spec, at, rows, progress)
            bias, latent = _effects(ids, at, spec, progress)
            score += bias * 0.35
            taste += latent * loadings[at]
            columns[f"c{at}"] = pa.array(ids)
        lengths = 1 + block.poisson(1.5, rows)
        moments = np.repeat(progress, lengths)
        ids = _draw_ids(block, spec, CATEGORICAL - 1, len(moments), moments)
        bias, _ = _effects(ids, CATEGORICAL - 1, spec, moments)
        owner = np.repeat(np.arange(rows), lengths)
        score += np.bincount(owner, bias, rows) / lengths * 0.5
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns[f"c{CATEGORICAL - 1}"] = pa.ListArray.from_arrays(offsets, pa.array(ids))
        dense = block.normal(size=(rows, DENSE))
        for at in range(DENSE):
            score += 0.08 * dense[:, at]
            taste += 0.3 * dense[:, at, None] * dense_loadings[at]
            missing = block.random(rows) < 0.02 * (at % 4)
            columns[f"d{at}"] = pa.array(np.floor(np.exp(dense[:, at] + 1)).astype(np.float32), mask=missing)
        score += (taste**2).sum(1) * 0.12 - (taste**2).sum(1).mean() * 0.12  # pairwise interactions of the hidden preferences
        logit = np.log(spec.click_rate / (1 - spec.click_rate)) + 1.1 * (score - score.mean())
        label = block.random(rows) < 1 / (1 + np.exp(-logit))
        arrays = {"label": pa.array(label.astype(np.int8)), "time": pa.array(begin + np.arange(rows, dtype=np.int64))} | columns
        yield pa.Table.from_pydict({name: arrays[name] for name in _schema().names}, schema=_schema())


def _draw_ids(random: np.random.Generator, spec: SyntheticSpec, column: int, count: int, progress: np.ndarray) -> np.ndarray:
    """Ids by a power law over ranks; which id holds a rank is renewed as time goes on, for each rank at moments of its own."""
    size = spec.cardinality(column)
    u = random.random(count)
    if abs(spec.skew - 1) < 1e-9:
        rank = np.exp(u * np.log(size + 1)) - 1
    else:
        top = (size + 1.0) ** (1 - spec.skew)
        rank = (1 + u * (top - 1)) ** (1 / (1 - spec.skew)) - 1
    rank = np.minimum(rank.astype(np.int64), size - 1)
    moment = _uniform(rank, column, spec.seed + 1)  # when this rank's id is renewed for the first time, if drift is 1
    renewals = np.maximum(np.ceil(progress * spec.drift - moment), 0).astype(np.int64)
    return rank + renewals * size  # the id that takes over a rank is a number of its own, beyond the ones before


def _effects(ids: np.ndarray, column: int, spec: SyntheticSpec, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden bias [n] and latent preferences [n, 4] of ids at their moments, from their hash: about normal.

    They turn from one draw towards another, independent one, and keep their variance.
    """
    draws = np.stack([_normal(ids, column * 8 + at, spec.seed) for at in range(_LATENT + 1)])
    if spec.preference_drift:
        angle = progress * spec.preference_drift * np.pi / 2
        others = np.stack([_normal(ids, column * 8 + at, spec.seed + 2) for at in range(_LATENT + 1)])
        draws = np.cos(angle) * draws + np.sin(angle) * others
    return draws[0], draws[1:].T


def _uniform(ids: np.ndarray, salt: int, seed: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt * 1000003 + seed * 7919 + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _normal(ids: np.ndarray, salt: int, seed: int) -> np.ndarray:
    """Mean 0, variance 1: a logistic variate."""
    u = np.clip(_uniform(ids, salt, seed), 1e-9, 1 - 1e-9)
    return np.log(u / (1 - u)) * (np.sqrt(3) / np.pi)
