"""Which rows the store keeps with a sketch of some size, beside those an exact counter of every id would keep.

    python benchmarks/sketch.py --json FILE [--ids 50000000] [--plot FILE]

Synthetic: lookups are drawn from power laws over more ids than are met, until `--ids` distinct ones have been; about 1 % of those fit
the budget. A lookup's gradient norm is log-normal by id (sigma 0.5) times log-normal noise (sigma 1), and f lookups of one step sum to
a gradient sqrt(f) as large. Importance f * ||g||, decay, admission and rounds are the defaults of `PolicyConfig`. All sketch sizes see
the same stream, through the compiled store.

R rows are in the store at the end, and E is the importance of the R-th id by an exact counter. Kept is the share in the store of

    certain   ids with importance above admission * E: what must have a row, whatever came before
    top       the R most important ids, borderline ones included (`mass`: of their importance)
    policy    the rows that the same policy holds at the end when an exact counter stands in the sketch's place,
              with the bytes of the largest sketch set aside

Between E and admission * E it depends on its past whether an id has a row, by design: a new one has to beat the threshold by that
factor. So even the exact counter does not hold all of `top`; its own shares are in the table. `below` is the share of the store's
rows with less than E / 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiited_ray.config import Config, DataConfig, ModelConfig, PolicyConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.policy import RoundSchedule, RoundState, ShardReport, importance_bin, width_of
from fiited_ray.store import ShardSpec, VhpiShard, ops

STEPS = 3000  # about, of a stream
LOOKUPS = 8  # about, for each distinct id
RESIDENT = 0.01  # of the distinct ids, about
ROW_BYTES = 100  # about, at the default dim 32 in chunks of 8
SIZES = (0.0025, 0.005, 0.01, 0.02, 0.04)  # of the sketch, as shares of the budget
POLICY = PolicyConfig()


@dataclass(frozen=True)
class Scenario:
    name: str
    exponent: float  # rank r is drawn in proportion to r^-exponent
    universe: float  # ids that can come, as a multiple of those that will have come
    drift: float  # times each rank goes to another id during the stream
    sizes: tuple[float, ...] = SIZES


SCENARIOS = (
    Scenario("power law 1.05", 1.05, 4.0, 0.0),
    Scenario("power law 0.8", 0.8, 1.3, 0.0),
    Scenario("power law 1.05, drifting", 1.05, 4.0, 3.0, SIZES[1:4]),
)


class Stream:
    """Batches of (distinct ids, lookups of each, gradient norms)."""

    def __init__(self, scenario: Scenario, ids: int) -> None:
        self.scenario = scenario
        self.universe = int(scenario.universe * ids)
        self.batch = LOOKUPS * ids // STEPS
        self._random = np.random.default_rng(0)
        self._of_id = np.exp(self._random.normal(0, 0.5, 1 << 16)).astype(np.float32)
        self._noise = np.exp(self._random.normal(0, 1, 1 << 16)).astype(np.float32)

    def draw(self, step: int) -> tuple[np.ndarray, ops.Deduped, np.ndarray]:
        power = 1 - self.scenario.exponent
        most = (self.universe + 1.0) ** power - 1
        ids = ((self._random.random(self.batch) * most + 1) ** (1 / power)).astype(np.int64) - 1
        if self.scenario.drift:  # now and then the id at a rank gives way to another, each rank at a time of its own
            epoch = (step / STEPS * self.scenario.drift + (ids * 0x9E3779B1 % (1 << 20)) / (1 << 20)).astype(np.int64)
            ids = (ids + epoch * 7_979_717) % self.universe
        local = ops.dedup_ids(torch.from_numpy(ids), torch.tensor([self.batch]), torch.zeros(1, dtype=torch.int32), 0, 1)
        distinct = np.empty(local.keys.numel(), np.int64)
        distinct[local.inverse.numpy()] = ids
        noise = self._noise[self._random.integers(0, 1 << 16, len(distinct))]
        norms = np.sqrt(local.counts.numpy(), dtype=np.float32) * self._of_id[distinct * 40_503 & 0xFFFF] * noise
        return distinct, local, norms


class Rounds:
    """When rounds come and what they decide, for the store and for the exact counter alike."""

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.threshold = 0.0
        self.fixed_bytes, self.row_bytes = spec.plan()
        self._schedule = RoundSchedule(POLICY)
        self._decider = LocalDecider(POLICY)

    def due(self, step: int, refused: int) -> bool:
        return self._schedule.due(step, refused > 0)

    def decide(self, step: int, histogram: np.ndarray, admitted_bytes: int, refused: int) -> bool:
        """Whether the threshold is to be applied anew."""
        report = ShardReport(histogram, self.fixed_bytes, admitted_bytes, refused, None)
        gaps = step - self._schedule.last_step, self._schedule.shortest_gap
        state = RoundState(self.spec.limit_bytes, self.threshold, self.spec.levels, self.row_bytes, *gaps)
        decision = self._decider.decide(step, [report], state)
        self._schedule.held(step)
        if decision is None or decision.skipped:
            return False
        self.threshold = decision.threshold
        return True


class Store:
    """The compiled store with one size of sketch."""

    def __init__(self, spec: ShardSpec) -> None:
        self.rounds = Rounds(spec)
        self.shard = VhpiShard(spec)
        self.seconds = 0.0
        self.admitted = 0

    def learn(self, step: int, local: ops.Deduped, norms: np.ndarray) -> None:
        start = time.perf_counter()
        spec = self.rounds.spec
        found = self.shard.lookup(local.keys, local.tables, local.counts, training=True, step=step)
        sizes = ops.gradient_sizes(found.widths, spec.chunk, spec.chunks).numpy()
        gradients = np.zeros(sizes.sum(), np.float32)
        gradients[np.cumsum(sizes) - sizes] = norms  # all in the first dimension
        self.shard.update(found, torch.from_numpy(gradients), None, 1e-3, step)
        stats = self.shard.stats()
        if self.rounds.due(step, stats.refused):
            if self.rounds.decide(step, self.shard.histogram().numpy(), stats.admitted_bytes, stats.refused):
                self.shard.resize(self.rounds.threshold)
            self.admitted += stats.admitted
            self.shard.reset_round_counters()
        self.seconds += time.perf_counter() - start

    def rows(self) -> np.ndarray:
        return self.shard.export_rows().raw_ids.numpy()


class ExactCounter:
    """The importance of every id, and the rows that the policy gives out by it."""

    def __init__(self, spec: ShardSpec, universe: int) -> None:
        self.rounds = Rounds(spec)
        self.importance = np.zeros(universe, np.float32)  # times `scale`
        self.scale = np.float32(1)
        self.distinct = 0
        self.admitted = 0
        self._row_bytes = np.asarray(self.rounds.row_bytes)
        self._widths = np.zeros(universe, np.uint8)
        self._planned = self.rounds.fixed_bytes
        self._admitted_bytes = self._refused = 0

    def learn(self, step: int, ids: np.ndarray, counts: np.ndarray, norms: np.ndarray) -> None:
        self.scale = np.float32(2.0 ** (step * -math.log2(POLICY.decay)))
        before = self.importance[ids]
        self.distinct += int((before == 0).sum())
        now = before + counts * norms * self.scale
        self.importance[ids] = now
        absent = self._widths[ids] == 0
        self._admit(ids[absent], self._wanted(now[absent] / np.float32(POLICY.admission)))
        if self.rounds.due(step, self._refused):
            self._hold_round(step)

    def _admit(self, ids: np.ndarray, widths: np.ndarray) -> None:
        ids, widths = ids[widths > 0], widths[widths > 0]
        fits = self._planned + np.cumsum(self._row_bytes[widths]) <= self.rounds.spec.limit_bytes
        self._widths[ids[fits]] = widths[fits]
        taken = int(self._row_bytes[widths[fits]].sum())
        self._planned += taken
        self._admitted_bytes += taken
        self._refused += int((~fits).sum())
        self.admitted += int(fits.sum())

    def _hold_round(self, step: int) -> None:
        rows = self.rows()
        importance = self.importance[rows]
        bins = importance_bin(importance / self.scale)
        held = self._row_bytes[self._widths[rows]]
        histogram = np.stack([np.bincount(bins, weights, 2048) for weights in (None, held)]).astype(np.int64)
        if self.rounds.decide(step, histogram, self._admitted_bytes, self._refused):
            self._widths[rows] = widths = self._wanted(importance)
            self._planned = self.rounds.fixed_bytes + int(self._row_bytes[widths].sum())
        self._admitted_bytes = self._refused = 0

    def _wanted(self, importance: np.ndarray) -> np.ndarray:
        return width_of(importance / self.scale, self.rounds.threshold, self.rounds.spec.levels)

    def rows(self) -> np.ndarray:
        return np.flatnonzero(self._widths)


def run(scenario: Scenario, ids: int, sizes: Sequence[float]) -> dict[str, Any]:
    """One stream through a store for each size."""
    budget = int(ids * RESIDENT * ROW_BYTES)
    specs = [_spec(size, budget) for size in sizes]
    stream = Stream(scenario, ids)
    exact = ExactCounter(specs[-1], stream.universe)
    stores = [Store(spec) for spec in specs]
    step, start = 0, time.perf_counter()
    while exact.distinct < ids:
        step += 1
        distinct, local, norms = stream.draw(step)
        exact.learn(step, distinct, local.counts.numpy(), norms)
        for store in stores:
            store.learn(step, local, norms)
        if step % 500 == 0:
            print(f"  step {step}: {exact.distinct:,} distinct ids, {time.perf_counter() - start:.0f} s", flush=True)
    result = {
        **dataclasses.asdict(scenario),
        "steps": step,
        "lookups": step * stream.batch,
        "distinct": exact.distinct,
        "budget_bytes": budget,
        "exact": _score(exact.rows(), exact, exact.admitted),
        "store": {},
    }
    for size, store in zip(sizes, stores, strict=True):
        stats = store.shard.stats()
        result["store"][f"{size:.2%}"] = {
            "sketch_bytes_share": stats.sketch / budget,
            "seconds": store.seconds,
            **_score(store.rows(), exact, store.admitted),
        }
    result["seconds"] = time.perf_counter() - start
    return result


def _spec(size: float, budget: int) -> ShardSpec:
    policy = dataclasses.replace(POLICY, sketch_share=size)
    return ShardSpec.of(Config(data=DataConfig(categorical=("id",)), policy=policy, model=ModelConfig(kind="dcnv2")), budget)


def _score(rows: np.ndarray, exact: ExactCounter, admitted: int) -> dict[str, float]:
    importance = exact.importance
    met = importance[importance > 0]
    edge = np.partition(met, len(met) - len(rows))[len(met) - len(rows)]
    here = np.zeros(len(importance), bool)
    here[rows] = True
    top, certain = np.flatnonzero(importance >= edge), np.flatnonzero(importance > POLICY.admission * edge)
    return {
        "rows": len(rows),
        "certain": float(here[certain].mean()),
        "top": float(here[top].mean()),
        "mass": float(importance[top][here[top]].sum(dtype=np.float64) / importance[top].sum(dtype=np.float64)),
        "policy": float(here[exact.rows()].mean()),
        "below": float((importance[rows] < edge / 2).mean()),
        "admitted_per_row": admitted / len(rows),
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['name']} (synthetic): {result['distinct']:,} distinct ids, {result['lookups']:,} lookups, "
        f"budget {result['budget_bytes'] / 2**20:.1f} MiB, {result['seconds']:.0f} s"
    )
    print(f"{'sketch':<8}{'rows':>10}{'certain':>10}{'top':>9}{'mass':>9}{'policy':>9}{'below':>9}{'admitted/row':>14}")
    for name, row in {**result["store"], "exact": result["exact"]}.items():
        shares = "".join(f"{row[kind]:>9.1%}" for kind in ("top", "mass", "policy", "below"))
        print(f"{name:<8}{row['rows']:>10,}{row['certain']:>10.1%}{shares}{row['admitted_per_row']:>14.2f}", flush=True)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    from fiited_ray.plots import BLUE, GREEN, GREY, ORANGE

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for result, colour in zip(results, (BLUE, ORANGE, GREEN), strict=False):
        name = f"{result['name']} ({result['distinct'] / 1e6:.2g} M ids)"
        sizes = [float(size.rstrip("%")) for size in result["store"]]
        for kind, style, label in (("certain", "o-", "certain"), ("top", "s:", "top R")):
            shares = [100 * row[kind] for row in result["store"].values()]
            axes.plot(sizes, shares, style, color=colour, label=f"{name}: {label}")
        axes.axhline(100 * result["exact"]["top"], color=colour, linewidth=0.6, label="    top R, exact counter as sketch")
    axes.axhline(95, color=GREY, linestyle="--", label="bar: 95 %")
    axes.set_xscale("log", base=2)
    axes.set_xticks([100 * size for size in SIZES], [f"{100 * size:g} %" for size in SIZES])
    axes.set_xlabel("sketch, share of the budget")
    axes.set_ylabel("kept, % of an exact counter's rows")
    axes.set_title("Rows kept against sketch size (synthetic streams, about 1 % of the ids resident)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=50_000_000)
    parser.add_argument("--sizes", nargs="+", type=float, help="of the sketch, as shares of the budget")
    parser.add_argument("--scenarios", nargs="+", type=int, default=[0, 1, 2], help="0: 1.05, 1: 0.8, 2: drifting")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for number in arguments.scenarios:
        results.append(run(SCENARIOS[number], arguments.ids, arguments.sizes or SCENARIOS[number].sizes))
        print_table(results[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps({"synthetic": True, "scenarios": results}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
