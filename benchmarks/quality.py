"""Quality of all methods at the same byte budgets, over seeds, by the same training loop.

    python benchmarks/quality.py --config jobs/configs/goodbooks.yaml --json FILE [key=value ...]

Each run is one process with one thread. Budgets are shares of the dense-equivalent bytes (float32, whatever the store's dtype), with
everything counted; `full` has none and stands for 100 %, so that other methods are not run at 100 %. A budget that a method cannot do
with is told and left out. FILE is written after each run; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from fiited_ray.config import Budget, Config, ConfigError, load
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, count_distinct, parquet_batches
from fiited_ray.exchange import Solo
from fiited_ray.fitting import settle
from fiited_ray.store.layout import dense_row_bytes
from fiited_ray.train.loop import Worker, train

METHODS = get_args(get_type_hints(Config)["method"])
BUDGETS = ("100%", "25%", "6.25%", "1.56%", "0.39%")

Row = dict[str, Any]


def run(config: Config, budget: int | None, distinct: list[int]) -> Row:
    """Train and score one method at one budget, in bytes, with one seed; returns its row of the results.

    Raises:
        ConfigError: for a budget the method cannot do with.
    """
    torch.set_num_threads(1)
    worker = Worker(config, budget, Solo(), LocalDecider(config.policy), distinct_ids=sum(distinct))
    data, size = config.data, config.train.batch_size

    def batches(patterns: tuple[str, ...], role: str, rows: int | None = None) -> Iterator[Batch]:
        return iter(parquet_batches(check_files(patterns, data, role), data, size, max_rows=rows))

    test = (lambda: batches(data.test, "data.test")) if data.test else None
    result = train(worker, lambda: batches(data.train, "data.train", data.max_rows), test)
    kind = "eval" if data.test else "progressive"
    return {
        "method": config.method,
        "budget": config.budget.share,
        "seed": config.seed,
        "auc": result[f"{kind}/auc"],
        "ne": result[f"{kind}/ne"],
        "logloss": result[f"{kind}/logloss"],
        "parameters_kept": result["parameters/kept_share"],
        "total_bytes": result["bytes/total"],
        "peak_bytes": result["bytes/peak_of_run"],
        "budget_bytes": budget,
        "dense_equivalent_bytes": sum(distinct) * dense_row_bytes(config.embedding),
        "samples_per_s": result["speed/samples_per_s_of_run"],
    }


def runs_of(config: Config, methods: list[str], budgets: list[str], seeds: list[int]) -> list[Config]:
    """What is to be run, seed by seed."""
    train = dataclasses.replace(config.train, workers=1, threads=1)
    shares = [Budget.parse(text) for text in budgets]
    if wrong := [text for text, budget in zip(budgets, shares, strict=True) if budget.share is None]:
        raise ConfigError(f"--budgets: shares such as 6.25% are wanted, not {', '.join(wrong)}")
    return [
        dataclasses.replace(config, method=method, budget=budget, seed=seed, train=train)
        for seed in seeds
        for budget in shares
        for method in methods
        if (method == "full") == (budget.share == 1)
    ]


def key_of(method: str, budget: float | None, seed: int) -> tuple[str, float, int]:
    return method, round(budget or 0, 9), seed


def results_in(file: Path | None, settings: str) -> list[Row]:
    """The rows that are there already.

    Raises:
        ConfigError: when they are of another configuration.
    """
    if file is None or not file.exists():
        return []
    rows: list[Row] = json.loads(file.read_text())
    if other := {row["settings"] for row in rows} - {settings}:
        raise ConfigError(f"--json {file}: holds results of {other.pop()!r}, not of {settings!r}; name another file")
    return rows


def run_missing(configs: list[Config], rows: list[Row], settings: str, file: Path | None) -> None:
    """Add the rows that are missing, each in a process of its own, and write all of them after each."""
    done = {key_of(row["method"], row["budget"], row["seed"]) for row in rows}
    missing = [config for config in configs if key_of(config.method, config.budget.share, config.seed) not in done]
    if not missing:
        return
    data = missing[0].data
    distinct = count_distinct(check_files(data.train, data), data, data.max_rows)
    print(f"{sum(distinct):,} distinct ids; {len(missing)} runs", flush=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for config in missing:
            try:
                row = pool.apply(run, (*settle(config, distinct), distinct))
            except ConfigError as error:
                print(f"{config.method} at {config.budget}, seed {config.seed}: left out. {error}", flush=True)
                continue
            rows.append(row | {"settings": settings})
            print(
                f"{row['method']} at {row['budget']:.2%}, seed {row['seed']}: AUC {row['auc']:.4f}, NE {row['ne']:.4f}, parameters kept "
                f"{row['parameters_kept']:.2%}, {row['total_bytes'] / 2**20:.1f} MiB, {row['samples_per_s']:,.0f} samples/s",
                flush=True,
            )
            if file:
                file.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Markdown: mean and sample standard deviation over seeds, and how far `fiited` leads at the same seed and budget."""
    columns = ("method", "budget", "seeds", "AUC, mean ± sd", "`fiited` leads by, mean ± sd (least)", "NE, mean ± sd")
    columns += ("parameters kept", "MiB, everything", "most at any step, of the budget", "samples/s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    ours = {(row["budget"], row["seed"]): row["auc"] for row in rows if row["method"] == "fiited"}
    cells = sorted({(-row["budget"], METHODS.index(row["method"])) for row in rows})
    for budget, number in cells:
        mine = [row for row in rows if row["budget"] == -budget and row["method"] == METHODS[number]]
        leads = [ours[key] - row["auc"] for row in mine if (key := (row["budget"], row["seed"])) in ours]
        lead = f"{spread(leads)} ({min(leads):.4f})" if leads and METHODS[number] != "fiited" else ""
        used = "-" if mine[0]["budget_bytes"] is None else f"{max(row['peak_bytes'] / row['budget_bytes'] for row in mine):.1%}"
        kept, size, speed = (statistics.mean(row[name] for row in mine) for name in ("parameters_kept", "total_bytes", "samples_per_s"))
        lines.append(
            f"| {METHODS[number]} | {-budget:.2%} | {len(mine)} | {spread([row['auc'] for row in mine])} | {lead} "
            f"| {spread([row['ne'] for row in mine])} | {kept:.2%} | {size / 2**20:.1f} | {used} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="shares of the dense-equivalent bytes; 100%% is `full`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="results; what it holds already is not run again")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    settings = " ".join([arguments.config, *sorted(arguments.overrides)])
    try:
        configs = runs_of(load(arguments.config, arguments.overrides), arguments.methods, arguments.budgets, arguments.seeds)
        rows = results_in(arguments.json, settings)
        run_missing(configs, rows, settings, arguments.json)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
