"""Train a model: python jobs/train.py --config FILE.yaml [key=value ...]"""

from __future__ import annotations

import argparse
import signal
import sys

from fiited_ray.config import ConfigError, load
from fiited_ray.data import DataError
from fiited_ray.summary import summary
from fiited_ray.train.plan import make_plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, such as jobs/configs/synthetic.yaml")
    parser.add_argument("overrides", nargs="*", help="settings such as budget=64MiB or train.workers=4")
    arguments = parser.parse_args()
    try:
        plan = make_plan(load(arguments.config, arguments.overrides))
        print(plan.describe(), flush=True)
        from fiited_ray.train.trainer import Stopped, run  # Ray and MLflow take seconds to import: mistakes are told before

        try:
            outcome = run(plan, lambda text: print(text, flush=True))
        except Stopped as stopped:
            print(stopped)
            return 128 + signal.SIGTERM
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a worker's
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(plan, outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
