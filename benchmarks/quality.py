"""Quality at a byte budget: ours beside whole-row pruning, the hashing trick and full width, by the same training loop.

    python benchmarks/quality.py --config jobs/configs/goodbooks.yaml --budgets 10% 2% --seeds 0 1 2 --json FILE [key=value ...]

Methods: `fiited` (widths by chunk), `rows` (one chunk: whole rows, as AdaEmbed prunes), `hash` (ids modulo a number of rows, plain
full-width tables of exactly the budget, each table's share in proportion to its distinct ids), `full` (every id at full width). One
process, one thread a run; budgets are shares of the dense-equivalent bytes (float32, whatever the store's dtype), everything counted.
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
from typing import Any

import torch

from fiited_ray.config import Budget, Config, load
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import Batch, check_files, parquet_batches
from fiited_ray.data.statistics import DistinctSketch
from fiited_ray.exchange import Solo
from fiited_ray.store import ShardSpec
from fiited_ray.store.ops import dedup_ids
from fiited_ray.train.loop import Worker, train

METHODS = ("fiited", "rows", "hash")


def distinct_by_table(config: Config) -> list[int]:
    """Distinct ids of each table in the training data, to about 1 %."""
    files = check_files(config.data.train, config.data)
    sketches = [DistinctSketch() for _ in config.data.tables]
    tables = torch.tensor(config.data.feature_tables, dtype=torch.int32)
    for batch in parquet_batches(files, config.data, 65536, max_rows=config.data.max_rows):
        found = dedup_ids(batch.ids, batch.offsets[batch.rows :: batch.rows].contiguous(), tables, 0, 1)
        for table, sketch in enumerate(sketches):
            mine = found.tables == table
            sketch.add(found.keys[mine].numpy(), found.tables[mine].numpy())
    return [sketch.estimate() for sketch in sketches]


def hashed(batches: Iterator[Batch], rows_of_feature: list[int]) -> Iterator[Batch]:
    """The hashing trick: ids modulo their table's rows."""
    for batch in batches:
        ends = batch.offsets[batch.rows :: batch.rows].tolist()
        parts = torch.tensor_split(batch.ids, ends[:-1])
        ids = torch.cat([part % rows for part, rows in zip(parts, rows_of_feature, strict=True)])
        yield dataclasses.replace(batch, ids=ids)


def run(config: Config, method: str, share: float, seed: int, distinct: list[int]) -> dict[str, Any]:
    """Train and score one method; returns a row of the table."""
    torch.set_num_threads(1)
    chunk = config.embedding.dim if method == "rows" else config.embedding.chunk
    workers = dataclasses.replace(config.train, workers=1)
    config = dataclasses.replace(config, seed=seed, embedding=dataclasses.replace(config.embedding, chunk=chunk), train=workers)
    row_bytes = ShardSpec.of(config, None).dense_row_bytes
    dense_equivalent = sum(distinct) * row_bytes
    budget = int(dense_equivalent * share)
    rows_of_table = [max(1, int(count * share)) for count in distinct]
    rows_of_feature = [rows_of_table[table] for table in config.data.feature_tables]
    worker = Worker(config, budget if method in ("fiited", "rows") else None, Solo(), LocalDecider(config.policy))
    data, size = config.data, config.train.batch_size

    def batches(patterns: tuple[str, ...], role: str, rows: int | None = None) -> Iterator[Batch]:
        read = parquet_batches(check_files(patterns, data, role), data, size, max_rows=rows)
        return hashed(iter(read), rows_of_feature) if method == "hash" else iter(read)

    test = (lambda: batches(data.test, "data.test")) if data.test else None
    result = train(worker, lambda: batches(data.train, "data.train", data.max_rows), test)
    kind = "eval" if data.test else "progressive"
    table_bytes = sum(rows_of_table) * row_bytes
    return {
        "method": method,
        "budget": share,
        "seed": seed,
        "auc": result[f"{kind}/auc"],
        "ne": result[f"{kind}/ne"],
        "logloss": result[f"{kind}/logloss"],
        "parameters_kept": sum(rows_of_table) / sum(distinct) if method == "hash" else result["parameters/kept_share"],
        "total_bytes": table_bytes if method == "hash" else result["bytes/total"],
        "peak_bytes": table_bytes if method == "hash" else result["bytes/peak_of_run"],
        "budget_bytes": None if method == "full" else budget,
        "dense_equivalent_bytes": dense_equivalent,
        "samples_per_s": result["speed/samples_per_s_of_run"],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'method':<8}{'budget':>8}{'seed':>6}{'AUC':>9}{'NE':>9}{'params kept':>13}{'MiB, all':>10}{'of budget':>11}{'samples/s':>11}")
    for row in sorted(rows, key=lambda row: (-row["budget"], row["method"], row["seed"])):
        used = f"{row['peak_bytes'] / row['budget_bytes']:.1%}" if row["budget_bytes"] else "-"
        print(
            f"{row['method']:<8}{row['budget']:>8.2%}{row['seed']:>6}{row['auc']:>9.4f}{row['ne']:>9.4f}{row['parameters_kept']:>13.2%}"
            f"{row['total_bytes'] / 2**20:>10.1f}{used:>11}{row['samples_per_s']:>11,.0f}"
        )


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Mean and sample standard deviation over seeds, and how far `fiited` leads the other methods at the same seed and bytes."""
    by_kind: dict[tuple[float, str], dict[int, float]] = {}
    for row in rows:
        by_kind.setdefault((row["budget"], row["method"]), {})[row["seed"]] = row["auc"]
    print(f"{'method':<8}{'budget':>8}{'seeds':>7}{'AUC, mean':>11}{'sd':>9}{'fiited leads by':>18}{'sd':>9}{'least':>9}")
    for (budget, method), scores in sorted(by_kind.items(), key=lambda item: (-item[0][0], item[0][1])):
        mean, spread = _mean_and_spread(list(scores.values()))
        line = f"{method:<8}{budget:>8.2%}{len(scores):>7}{mean:>11.4f}{spread:>9}"
        ours = by_kind.get((budget, "fiited"), {})
        leads = [ours[seed] - score for seed, score in scores.items() if seed in ours]
        if leads and method != "fiited":
            mean, spread = _mean_and_spread(leads)
            line += f"{mean:>18.4f}{spread:>9}{min(leads):>9.4f}"
        print(line)


def _mean_and_spread(values: list[float]) -> tuple[float, str]:
    return statistics.mean(values), f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--budgets", nargs="+", default=["10%", "2%"])
    parser.add_argument("--methods", nargs="+", default=["full", *METHODS], choices=["full", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    config = load(arguments.config, arguments.overrides)
    distinct = distinct_by_table(config)
    print(f"{sum(distinct):,} distinct ids", flush=True)
    shares = [share for text in arguments.budgets if (share := Budget.parse(text).share) is not None]
    jobs = [(config, "full", 1.0, seed, distinct) for seed in arguments.seeds if "full" in arguments.methods]
    jobs += [
        (config, method, share, seed, distinct)
        for seed in arguments.seeds
        for share in shares
        for method in arguments.methods
        if method != "full"
    ]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for job in [pool.apply_async(run, job) for job in jobs]:
            rows.append(job.get())
            print_table(rows[-1:])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    print()
    print_table(rows)
    print()
    print_summary(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
