"""Drift on synthetic data: quality over time of widths that follow it, of widths frozen early, and of full width; and how fast they follow.

    python benchmarks/drift.py --plot docs/plots/drift.png --json FILE

Ids of all popularity ranks are replaced by new ones, and what ids mean for the label turns, all through the stream. Each batch is scored
before it is learned from. `frozen` stops at a tenth of the stream: no row comes, goes or changes width from there on, though all go on
learning. Newcomers are ids that are first met behind that tenth, leavers ids met no more from some step on, each with `--often` lookups
or more. One process, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fiited_ray import plots
from fiited_ray.config import Config, load
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, count_distinct, parquet_batches
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic
from fiited_ray.exchange import Solo
from fiited_ray.fitting import settle
from fiited_ray.store.ops import dedup_ids
from fiited_ray.train.loop import Worker, train_step
from fiited_ray.train.rounds import hold_round

CONFIG = Path(__file__).parent.parent / "jobs" / "configs" / "synthetic.yaml"
WINDOWS = 20  # of the stream, each with an AUC of its own
FROZEN_FROM = 0.1  # of the stream
FAST_DECAY = 0.98  # of importance, per step
EVERY = 4  # steps between two looks at the widths
AGES = np.arange(-40, 201, EVERY)  # steps since an id came or left


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Ids and the step at which each came or left."""

    features: np.ndarray  # int64 [n]
    ids: np.ndarray  # int64 [n]
    moments: np.ndarray  # int64 [n]


def batches_of(config: Config) -> Iterator[Batch]:
    files = check_files(config.data.train, config.data)
    return iter(parquet_batches(files, config.data, config.train.batch_size, max_rows=config.data.max_rows))


def cohorts_of(config: Config, often: int) -> tuple[dict[str, Cohort], int]:
    """Newcomers and leavers of the stream, and its number of steps."""
    features, ids, steps = [], [], []
    for step, batch in enumerate(batches_of(config), 1):
        for feature, part in enumerate(torch.tensor_split(batch.ids, batch.offsets[batch.rows : -1 : batch.rows])):
            features.append(np.full(len(part), feature))
            ids.append(part.numpy())
            steps.append(np.full(len(part), step))
    feature, raw, when = (np.concatenate(each) for each in (features, ids, steps))
    pairs = np.stack([feature, raw], 1)
    order = np.lexsort((when, raw, feature))
    starts = np.flatnonzero(np.append(True, (np.diff(pairs[order], axis=0) != 0).any(1)))
    counts = np.diff(np.append(starts, len(order)))
    first, last = when[order[starts]], when[order[starts + counts - 1]]
    feature, raw = feature[order[starts]], raw[order[starts]]
    end = int(when[-1])
    came = (counts >= often) & (first > FROZEN_FROM * end) & (first < 0.6 * end)
    left = (counts >= often) & (last > 0.3 * end) & (last < 0.6 * end)
    return {
        "newcomers": Cohort(feature[came], raw[came], first[came]),
        "leavers": Cohort(feature[left], raw[left], last[left]),
    }, end


class Widths:
    """Mean dimensions of a cohort's ids by steps since their moment."""

    def __init__(self, worker: Worker, cohort: Cohort) -> None:
        order = np.argsort(cohort.features, kind="stable")
        features = torch.tensor(worker.config.data.feature_tables, dtype=torch.int32)
        ends = torch.from_numpy(np.searchsorted(cohort.features[order], np.arange(len(features)), side="right"))
        found = dedup_ids(torch.from_numpy(cohort.ids[order]), ends, features, worker.spec.seed, 1)
        self._inverse = found.inverse.long()
        self._asked = (found.keys, found.tables, found.counts)
        self._moments = cohort.moments[order]
        self._worker = worker
        self._sums, self._numbers = np.zeros(len(AGES)), np.zeros(len(AGES))

    def look(self, step: int) -> None:
        widths = self._worker.shard.lookup(*self._asked, training=False).widths[self._inverse].numpy() * self._worker.spec.chunk
        bins = (step - self._moments - AGES[0]) // EVERY
        inside = (bins >= 0) & (bins < len(AGES))
        self._sums += np.bincount(bins[inside], widths[inside], len(AGES))
        self._numbers += np.bincount(bins[inside], minlength=len(AGES))

    def mean(self) -> list[float]:
        """By age; NaN where no id of the cohort had that age."""
        with np.errstate(invalid="ignore"):
            return (self._sums / self._numbers).tolist()


def run(config: Config, distinct: list[int], cohorts: dict[str, Cohort], steps: int, frozen_from: int | None) -> dict[str, Any]:
    """Train on the stream; returns AUC by window and widths by age."""
    torch.manual_seed(config.seed)
    config, budget = settle(config, distinct)
    worker = Worker(config, budget, Solo(), LocalDecider(config.policy))
    widths = {name: Widths(worker, cohort) for name, cohort in cohorts.items()}
    windows = []
    for step, batch in enumerate(batches_of(config), 1):
        train_step(worker, batch)
        if step == frozen_from:
            worker.embedding.admits = False
        if worker.embedding.admits and worker.schedule.due(step, worker.embedding.crowded):
            hold_round(worker)
        if step % EVERY == 0:
            for each in widths.values():
                each.look(step)
        if step * WINDOWS // steps > (step - 1) * WINDOWS // steps:
            windows.append({"step": step, "auc": worker.window.compute()["auc"]})
            worker.window.reset()
    stats = worker.shard.stats()
    return {
        "windows": windows,
        "auc_of_the_last_half": float(np.mean([each["auc"] for each in windows[WINDOWS // 2 :]])),
        "widths": {name: each.mean() for name, each in widths.items()},
        "total_bytes": stats.total,
        "budget_bytes": budget,
    }


def half_way(newcomers: list[float], leavers: list[float]) -> tuple[str, str]:
    """Steps until newcomers have half of the most dimensions they get, and leavers half of those they had when they left."""
    came, left = np.asarray(newcomers), np.asarray(leavers)
    wide = np.flatnonzero(came >= np.nanmax(came) / 2)
    narrow = np.flatnonzero((left <= left[AGES == 0] / 2) & (AGES > 0))
    wide_at, narrow_at = (f"{AGES[at[0]]} steps" if len(at) else f"> {AGES[-1]} steps" for at in (wide, narrow))
    return wide_at, narrow_at


def figure_of(runs: dict[str, dict[str, Any]], frozen_at: int) -> Figure:
    colours = dict(zip(runs, (plots.GREY, plots.BLUE, plots.GREEN, plots.RED), strict=True))
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(3, 2, 3))
    for name, each in runs.items():
        steps, aucs = ([window[key] for window in each["windows"]] for key in ("step", "auc"))
        top.plot(steps, aucs, color=colours[name], label=name, marker=".")
        reference = [window["auc"] for window in runs["full width"]["windows"]]
        middle.plot(steps, np.subtract(aucs, reference), color=colours[name], marker=".")
    for axes in (top, middle):
        axes.axvline(frozen_at, color=plots.RED, linestyle=":", linewidth=1)
        axes.set_xlabel("step")
    top.annotate("frozen from here", (frozen_at, 0.02), xycoords=("data", "axes fraction"), color=plots.RED, fontsize=8, ha="left")
    top.set_ylabel("AUC")
    top.set_title("Quality under drift, each batch before it is learned from (synthetic data)", loc="left", fontsize=11)
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    middle.set_ylabel("AUC less full width's")
    for name, each in runs.items():
        if name.startswith("fiited"):
            bottom.plot(AGES, each["widths"]["newcomers"], color=colours[name], label=f"newcomers, {name}")
            bottom.plot(AGES, each["widths"]["leavers"], color=colours[name], linestyle="--", label=f"leavers, {name}")
    bottom.axvline(0, color=plots.GREY, linewidth=1)
    bottom.set_xlabel("steps since the id came (newcomers) or left (leavers)")
    bottom.set_ylabel("mean dimensions")
    bottom.set_title("How fast widths follow", loc="left", fontsize=11)
    bottom.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--drift", type=float, default=4.0, help="of popularity, as in jobs/prepare.py synthetic")
    parser.add_argument("--preference-drift", type=float, default=1.0)
    parser.add_argument("--often", type=int, default=50, help="lookups of an id that is followed")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        spec = SyntheticSpec(arguments.rows, test_share=0.0, drift=arguments.drift, preference_drift=arguments.preference_drift)
        train_file, *_ = write_synthetic(Path(folder), spec)
        settings = [
            f"data.train={train_file}",
            "data.test=[]",
            "train.workers=1",
            "train.batch_size=1024",
            "budget=1/64",
            *arguments.overrides,
        ]
        config = load(CONFIG, settings)
        distinct = count_distinct(check_files(config.data.train, config.data), config.data)
        cohorts, steps = cohorts_of(config, arguments.often)
        frozen_at = int(FROZEN_FROM * steps)
        numbers = ", ".join(f"{len(cohort.ids):,} {name}" for name, cohort in cohorts.items())
        print(f"{steps} steps, {sum(distinct):,} distinct ids, {numbers} with {arguments.often} lookups or more", flush=True)
        fast = dataclasses.replace(config, policy=dataclasses.replace(config.policy, decay=FAST_DECAY))
        kinds = {
            "full width": (dataclasses.replace(config, method="full"), None),
            f"fiited, decay {config.policy.decay}": (config, None),
            f"fiited, decay {FAST_DECAY}": (fast, None),
            "frozen": (config, frozen_at),
        }
        runs = {}
        print(f"{'':<24}{'AUC of the last half':>22}{'MiB':>8}{'newcomers half wide':>22}{'leavers half narrow':>22}")
        for name, (each, frozen) in kinds.items():
            runs[name] = run(each, distinct, cohorts, steps, frozen)
            came, left = half_way(**runs[name]["widths"]) if name.startswith("fiited") else ("-", "-")
            size = runs[name]["total_bytes"] / 2**20
            print(f"{name:<24}{runs[name]['auc_of_the_last_half']:>22.4f}{size:>8.1f}{came:>22}{left:>22}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"ages": AGES.tolist(), "frozen_at": frozen_at, "runs": runs}, indent=1) + "\n")
    if arguments.plot:
        figure_of(runs, frozen_at).savefig(arguments.plot, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
