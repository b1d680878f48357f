"""Score a saved model: python jobs/evaluate.py --model FOLDER [--data FILE ...]"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from fiited_ray.checkpoint import CheckpointError, load_model
from fiited_ray.config import ConfigError
from fiited_ray.data import DataError, check_files, parquet_batches
from fiited_ray.data.files import check_same_ids
from fiited_ray.train.metrics import BinaryMetrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or address of a saved model, as jobs/train.py names it at its end")
    parser.add_argument("--data", nargs="*", default=[], help="Parquet files; the configured test files if left out")
    arguments = parser.parse_args()
    try:
        model = load_model(arguments.model)
        patterns = tuple(arguments.data) or model.config.data.test
        data = dataclasses.replace(model.config.data, time=None)  # the order does not matter to a score
        files = check_files(patterns, data, "--data")
        if model.text_ids is not None:
            check_same_ids(files, model.text_ids, f"the data that {arguments.model} has learned from")
        metrics = BinaryMetrics()
        for batch in parquet_batches(files, data, 4 * model.config.train.batch_size):
            metrics.update(model.logits(batch), batch.labels)
        scores = metrics.compute()
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"model {arguments.model}: {model.rows:,} rows, trained for {model.step:,} steps")
    print(
        f"{scores['rows']:,.0f} rows{' of synthetic data' if files.synthetic else ''}: AUC {scores['auc']:.4f}, NE {scores['ne']:.4f}, "
        f"log loss {scores['logloss']:.4f}, calibration {scores['calibration']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
