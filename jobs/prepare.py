"""Make Parquet data sets: python jobs/prepare.py synthetic --output DIR, or criteo / avazu --input FILE ... --output DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fiited_ray.data import DataError
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    synthetic = kinds.add_parser("synthetic", help="Criteo-shaped rows with planted signal and drift")
    synthetic.add_argument("--output", type=Path, required=True)
    synthetic.add_argument("--rows", type=int, default=SyntheticSpec.rows)
    synthetic.add_argument("--seed", type=int, default=0)
    synthetic.add_argument("--skew", type=float, default=SyntheticSpec.skew)
    synthetic.add_argument("--drift", type=float, default=SyntheticSpec.drift)
    arguments = parser.parse_args()
    try:
        spec = SyntheticSpec(rows=arguments.rows, seed=arguments.seed, skew=arguments.skew, drift=arguments.drift)
        train, test = write_synthetic(arguments.output, spec)
        print(f"wrote {spec.rows:,} synthetic rows to {train} and {test}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
