"""The store as plain Python: one dictionary of rows. Slow, easy to read, and the oracle the compiled store is tested against.

It follows the same rules to the same numbers (widths, importance and admissions exactly, values to rounding), in float32 storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiited_ray.store import ops
from fiited_ray.store.layout import ShardSpec
from fiited_ray.store.shard import ALL_KEYS, Lookup, Rows

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_LOWER_AT = 16  # octaves
F32 = np.float32


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key_of(raw_id: int, table: int, seed: int) -> int:
    """Virtual key of an id as an unsigned 64-bit number."""
    before = mix64((seed + _GOLDEN * (2 * table + 1)) & _MASK)
    between = mix64((before + _GOLDEN) & _MASK)
    return mix64((mix64((raw_id & _MASK) ^ before) + between) & _MASK)


def initial_values(key: int, table: int, first: int, end: int, scale: float) -> np.ndarray:
    """float32 [end - first]: what dimensions first..end of a new row start from."""
    out = np.empty(end - first, F32)
    for dim in range(first, end):
        word = mix64(((key ^ (table << 32)) + _GOLDEN * ((dim >> 1) + 1)) & _MASK)
        half = (word >> 32 if dim & 1 else word) & 0xFFFFFFFF
        out[dim - first] = (F32(half >> 8) * F32(2.0**-23) - F32(1)) * F32(scale)
    return out


def importance_bin(importance: float | np.floating[Any]) -> int:
    bits = int(np.array(importance, F32).view(np.uint32))
    return min(max((bits >> 18) - ((127 - 44) << 5), 0), 2047)


@dataclass
class _Row:
    width: int
    importance: np.float32  # scaled
    vector: np.ndarray  # float32 [width * c]
    state: np.ndarray  # float32, moments by width


@dataclass
class _Sketch:
    """Sets of 32 entries (tag, code), oldest first; a code stands for 2^((base + code) / 4)."""

    sets_per_bucket: int
    sets: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    base: int = 0

    def add(self, key: int, weight: np.float32, step: int) -> np.float32:
        entries, tag = self._set(key), (key >> 32) & 0xFFF
        random = mix64((~key + _GOLDEN * step) & _MASK)
        own, smallest = self._find(entries, tag)
        at = smallest if own is None else own
        total = F32(self._value(entries[at][1]) + weight)
        if own is not None or F32(_unit(random) * total) < weight:
            self._put(entries, at, tag, self._code(total, _unit(random >> 32)))
        return weight if own is None else total

    def hand_back(self, key: int, importance: np.float32) -> None:
        entries, tag = self._set(key), (key >> 32) & 0xFFF
        own, smallest = self._find(entries, tag)
        at = smallest if own is None else own
        code = self._code(importance, F32(1))
        if code > entries[at][1]:
            self._put(entries, at, tag, code)

    def forget(self, key: int) -> None:
        entries, tag = self._set(key), (key >> 32) & 0xFFF
        entries[:] = [(0, 0) if other == tag else (other, code) for other, code in entries]

    def lower(self, octaves: int) -> None:
        self.base -= 4 * octaves

    def aim(self, importance: np.float32) -> None:
        base = _level_below(importance) - 13
        by, self.base = base - self.base, base
        for entries in self.sets.values():
            entries[:] = [(tag, min(code - by, 15)) if code > max(by, 0) else (0, 0) for tag, code in entries]

    def _set(self, key: int) -> list[tuple[int, int]]:
        number = ((key & 0xFFFFFFFF) * self.sets_per_bucket) >> 32
        return self.sets.setdefault((key >> 54, number), [(0, 0)] * 32)

    @staticmethod
    def _find(entries: list[tuple[int, int]], tag: int) -> tuple[int | None, int]:
        own = [at for at, (other, code) in enumerate(entries) if other == tag and code]
        return own[-1] if own else None, min(range(32), key=lambda at: entries[at][1])

    @staticmethod
    def _put(entries: list[tuple[int, int]], at: int, tag: int, code: int) -> None:
        if code:
            entries[:] = [*entries[:at], *entries[at + 1 :], (tag, code)]

    def _value(self, code: int) -> np.float32:
        return _power(self.base + code) if code else F32(0)

    def _code(self, value: np.float32, chance: np.float32) -> int:
        code = max(_level_below(value) - self.base, 0)
        if code >= 15:
            return 15
        below = self._value(code)
        return code + bool(F32(chance * F32(self._value(code + 1) - below)) < F32(value - below))


_STEPS = [F32(2 ** (step / 4)) for step in range(4)]


def _power(level: int) -> np.float32:
    return F32(_STEPS[level % 4] * F32(2.0 ** min(max(level // 4, -126), 127)))


def _level_below(x: np.float32) -> int:
    bits = int(np.array(x, F32).view(np.uint32))
    within = np.array((bits & 0x7FFFFF) | 0x3F800000, np.uint32).view(F32)
    return 4 * ((bits >> 23) - 127) + max(step for step in range(4) if _STEPS[step] <= within)


def _unit(random: int) -> np.float32:
    return F32(((random & 0xFFFFFFFF) >> 8) * 2.0**-24)


class ReferenceShard:
    """Twin of `VhpiShard`: same arguments, same answers."""

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.threshold = 0.0
        self.rows: dict[tuple[int, int], _Row] = {}
        self._changed: set[tuple[int, int]] = set()  # since `take_changed`
        self.sketch = _Sketch(spec.sketch_sets)
        self.fixed, self.row_bytes = spec.plan()
        self.planned = self.fixed
        self.limit = spec.limit_bytes
        self.lookups = self.hits = self.admitted = self.refused = self.resized = self.evicted = 0
        self._scale = F32(1)
        self._lowered = 0
        self._full = False  # a row found no room at this step: no other gets in

    def lookup(
        self,
        keys: Tensor,
        tables: Tensor,
        counts: Tensor,
        *,
        training: bool,
        step: int = 0,
        quota: int = ALL_KEYS,
    ) -> Lookup:
        widths = []
        self._full = False
        for key, table, count in self._ids(keys, tables, counts):
            row = self.rows.get((key, table))
            if training:
                self.lookups += count
                self.hits += count if row else 0
                if row is None and self.threshold == 0:
                    row = self._ask(key, table, self.spec.chunks, F32(0), step, quota)
            widths.append(row.width if row else 0)
        return Lookup(keys, tables, counts, torch.empty(len(widths), dtype=torch.int32), torch.tensor(widths, dtype=torch.uint8))

    def read(self, found: Lookup, take: Tensor | None = None) -> Tensor:
        ids = self._ids(found.keys, found.tables, found.counts)
        wanted = range(len(ids)) if take is None else take.tolist()
        rows = [self.rows.get(ids[number][:2]) for number in wanted]
        return _joined([row.vector for row in rows if row])

    def pool(self, found: Lookup, bags: ops.Bags) -> Tensor:
        return ops.pool(self.read(found), found.widths, bags)

    def update_pooled(
        self, found: Lookup, grad_pooled: Tensor, bags: ops.Bags, lookup_norms: Tensor | None, lr: float, step: int, quota: int = ALL_KEYS
    ) -> None:
        self.update(found, ops.wire_gradients(grad_pooled, found.widths, bags), lookup_norms, lr, step, quota)

    def update(
        self,
        found: Lookup,
        gradients: Tensor,
        lookup_norms: Tensor | None,
        lr: float,
        step: int,
        quota: int = ALL_KEYS,
        target: Tensor | None = None,
    ) -> None:
        self._advance(step)
        self._full = False
        flat, at = self._summed(found, gradients, target).numpy(), 0
        sizes = ops.gradient_sizes(found.widths, self.spec.chunk, self.spec.chunks).tolist()
        for number, (key, table, count) in enumerate(self._ids(found.keys, found.tables, found.counts)):
            live, size = max(int(found.widths[number]), 1) * self.spec.chunk, sizes[number]
            gradient = flat[at : at + size]
            at += size
            norm = F32(np.sqrt(np.sum(gradient.astype(np.float64) ** 2)))
            gain = {
                "frequency_x_norm": F32(count) * norm,
                "norm": norm,
                "lookup_norm_sum": F32(0) if lookup_norms is None else F32(lookup_norms[number]),
                "frequency": F32(count),
            }[self.spec.importance] * self._scale
            row = self.rows.get((key, table))
            if row is not None:
                row.importance = F32(row.importance + gain)
                self._changed.add((key, table))
                self._learn(row, gradient[:live], lr, step)
            else:
                row = self._win_row(key, table, F32(gain), step, quota)
                if row is not None:
                    self._learn(row, gradient[:live], lr, step)

    def _summed(self, found: Lookup, gradients: Tensor, target: Tensor | None) -> Tensor:
        """The gradients that arrived for each row, summed."""
        if target is None:
            return gradients
        sizes = ops.gradient_sizes(found.widths, self.spec.chunk, self.spec.chunks).tolist()
        sums = [torch.zeros(size) for size in sizes]
        for to, part in zip(target.tolist(), gradients.split([sizes[to] for to in target.tolist()]), strict=True):
            sums[to] += part
        return torch.cat([torch.empty(0), *sums])

    def histogram(self) -> Tensor:
        out = torch.zeros(2, 2048, dtype=torch.int64)
        for row in self.rows.values():
            place = importance_bin(row.importance / self._scale)
            out[0, place] += 1
            out[1, place] += self.row_bytes[row.width]
        return out

    def resize(self, threshold: float) -> None:
        self.threshold = threshold
        self._aim_sketch()
        for (key, table), row in list(self.rows.items()):
            wanted = self._width(row.importance)
            if wanted == 0:
                self.sketch.hand_back(key, row.importance)
                del self.rows[key, table]
                self.planned -= self.row_bytes[row.width]
                self.evicted += 1
            elif wanted < row.width:
                self._reshape(key, table, row, wanted)
        for (key, table), row in self.rows.items():
            if (wanted := self._width(row.importance)) > row.width:
                self._reshape(key, table, row, wanted)

    def rows_by_width(self) -> Tensor:
        out = torch.zeros(self.spec.tables, self.spec.chunks, dtype=torch.int64)
        for (_, table), row in self.rows.items():
            out[table, row.width - 1] += 1
        return out

    @staticmethod
    def _ids(keys: Tensor, tables: Tensor, counts: Tensor) -> list[tuple[int, int, int]]:
        return [(key & _MASK, table, count) for key, table, count in zip(keys.tolist(), tables.tolist(), counts.tolist(), strict=True)]

    def _width(self, scaled: np.float32, margin: float = 1.0) -> int:
        if self.threshold == 0:
            return self.spec.chunks
        importance = F32(F32(scaled * (F32(1) / self._scale)) / F32(margin))
        return sum(bool(importance > F32(self.threshold * level)) for level in self.spec.levels)

    def _ask(self, key: int, table: int, width: int, scaled: np.float32, step: int, quota: int) -> _Row | None:
        if self._full or (mix64((key + _GOLDEN * step) & _MASK) >> 32) >= quota:
            self.refused += 1
            return None
        row = self._admit(key, table, width, scaled)
        self._full = row is None
        return row

    def _admit(self, key: int, table: int, width: int, scaled: np.float32) -> _Row | None:
        if self.limit is not None and self.planned + self.row_bytes[width] > self.limit:
            self.refused += 1
            return None
        vector = initial_values(key, table, 0, width * self.spec.chunk, self.spec.init_scale)
        row = _Row(width, scaled, vector, np.zeros(self.spec.state_bytes(width) // 4, F32))
        self.rows[key, table] = row
        self._changed.add((key, table))
        self.planned += self.row_bytes[width]
        self.admitted += 1
        return row

    def _win_row(self, key: int, table: int, gain: np.float32, step: int, quota: int) -> _Row | None:
        if self.threshold == 0:
            return None
        estimate = self.sketch.add(key, gain, step)
        width = self._width(F32(estimate), self.spec.admission)
        if width == 0:
            return None
        row = self._ask(key, table, width, estimate, step, quota)
        if row is not None:
            self.sketch.forget(key)
        return row

    def _reshape(self, key: int, table: int, row: _Row, width: int) -> None:
        more = self.row_bytes[width] - self.row_bytes[row.width]
        if self.limit is not None and more > 0 and self.planned + more > self.limit:
            self.refused += 1
            return
        kept, size = min(row.width, width) * self.spec.chunk, width * self.spec.chunk
        fresh = initial_values(key, table, kept, size, self.spec.restore_scale)
        row.vector = np.concatenate([row.vector[:kept], fresh])
        moments = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2}[self.spec.optimizer]
        if moments:
            old = row.state.reshape(moments, -1)
            row.state = np.concatenate([np.concatenate([each[:kept], np.zeros(size - kept, F32)]) for each in old])
        self.planned += self.row_bytes[width] - self.row_bytes[row.width]
        row.width = width
        self._changed.add((key, table))
        self.resized += 1

    def _learn(self, row: _Row, g: np.ndarray, lr: float, step: int) -> None:
        """A step of a row's first dimensions, mostly all, of which `g` is the gradient."""
        eps, size = F32(self.spec.eps), row.vector.size
        vector = row.vector[: g.size]
        if self.spec.optimizer == "sgd":
            vector -= F32(lr) * g
        elif self.spec.optimizer == "rowwise_adagrad":
            row.state[0] += F32(np.mean(g.astype(np.float64) ** 2))
            vector -= F32(lr) / (np.sqrt(row.state[0]) + eps) * g
        elif self.spec.optimizer == "adagrad":
            state = row.state[: g.size]
            state += g * g
            vector -= F32(lr) * g / (np.sqrt(state) + eps)
        else:
            beta1, beta2 = self.spec.betas
            m, s = row.state[: g.size], row.state[size : size + g.size]
            m += F32(1 - beta1) * (g - m)
            s += F32(1 - beta2) * (g * g - s)
            vector -= F32(lr) * (m / F32(1 - beta1**step)) / (np.sqrt(s / F32(1 - beta2**step)) + eps)

    def _advance(self, step: int) -> None:
        octaves = step * -math.log2(self.spec.decay) - self._lowered
        if octaves > _LOWER_AT:
            by = int(octaves)
            for row in self.rows.values():
                row.importance = F32(row.importance * F32(2.0**-by))
            self._changed.update(self.rows)
            self.sketch.lower(by)
            self._lowered += by
            octaves -= by
        self._scale = F32(2.0**octaves)
        self._aim_sketch()

    def _aim_sketch(self) -> None:
        if self.threshold > 0:
            self.sketch.aim(F32(F32(self.threshold * self.spec.admission) * self._scale))

    def take_changed(self) -> set[tuple[int, int]]:
        """(key, table) of the rows written since the last call; `VhpiShard.changed` adds those that only moved to another address."""
        taken, self._changed = self._changed & self.rows.keys(), set()
        return taken

    def sketch_cells(self) -> tuple[Tensor, int]:
        """The sketch as `VhpiShard.sketch` gives it, int16 [buckets, sets * 32], and its level."""
        per_bucket = self.spec.sketch_sets
        cells = np.zeros((self.spec.end_bucket - self.spec.first_bucket, per_bucket * 32), np.uint16)
        for (bucket, number), entries in self.sketch.sets.items():
            words = [tag << 4 | code if code else 0 for tag, code in entries]
            cells[bucket - self.spec.first_bucket, number * 32 : (number + 1) * 32] = words
        return torch.from_numpy(cells.view(np.int16)), self.sketch.base

    def export_rows(self) -> Rows:
        """Rows ordered by key, as `VhpiShard.export_rows` gives them, with keys (not raw ids) in `raw_ids`."""
        ordered = sorted(self.rows.items())
        signed = [key - 2**64 if key >= 2**63 else key for (key, _), _ in ordered]
        return Rows(
            torch.tensor(signed, dtype=torch.int64),
            torch.tensor([table for (_, table), _ in ordered], dtype=torch.int32),
            torch.tensor([row.width for _, row in ordered], dtype=torch.uint8),
            torch.tensor([float(row.importance / self._scale) for _, row in ordered]),
            _joined([row.vector for _, row in ordered]),
            _joined([row.state for _, row in ordered]),
        )


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, F32), *parts]))
