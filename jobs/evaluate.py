"""Score a saved model: python jobs/evaluate.py --model FOLDER [--data FILE ...]"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from fiited_ray.config import ConfigError
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data import DataError, check_files, parquet_batches
from fiited_ray.exchange import Solo
from fiited_ray.train import checkpoint
from fiited_ray.train.loop import Worker, evaluate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model, as jobs/train.py names it at its end")
    parser.add_argument("--data", nargs="*", default=[], help="Parquet files; the configured test files if left out")
    arguments = parser.parse_args()
    try:
        model = checkpoint.open_model(arguments.model)
        config = model.config
        patterns = tuple(arguments.data) or config.data.test
        data = dataclasses.replace(config.data, time=None)  # the order does not matter to a score
        files = check_files(patterns, data, "--data")
        worker = Worker(config, None, Solo(), LocalDecider(config.policy))
        checkpoint.restore(model, worker.shard)
        checkpoint.load_dense(model, worker.dense)
        scores = evaluate(worker, parquet_batches(files, data, 4 * config.train.batch_size))
    except (ConfigError, DataError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = worker.shard.stats().rows
    print(f"model {arguments.model}: {rows:,} rows, trained for {model.step:,} steps")
    print(
        f"{scores['rows']:,.0f} rows{' of synthetic data' if files.synthetic else ''}: AUC {scores['auc']:.4f}, NE {scores['ne']:.4f}, "
        f"log loss {scores['logloss']:.4f}, calibration {scores['calibration']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
