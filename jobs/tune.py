"""Find how small the embeddings can be: python jobs/tune.py target|grid|search --config FILE.yaml [options] [key=value ...]

    target   the smallest budget that loses no more than --drop against full width, by bisection
    grid     these budgets and methods, and every value of --vary
    search   what is best in both quality and bytes, by Optuna and ASHA

A sweep's name is the configuration's (name=...). Asked again, or after an interruption, it trains only what it does not know yet.
"""

from __future__ import annotations

import argparse
import sys

from fiited_ray.config import Budget, ConfigError, load
from fiited_ray.data import DataError
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.space import FULL, METHODS, Choices, grid, parse_budgets, parse_vary


def main() -> int:
    arguments = _parser().parse_args()
    try:
        base = load(arguments.config, arguments.overrides)
        measure = Measure.of(base, arguments.metric, arguments.drop)
        from fiited_ray.tune.sweep import Question, sweep  # Ray and MLflow take seconds to import: mistakes are told before

        question = Question(base, _asked(arguments), measure, arguments.baseline, arguments.parallel)
        outcome = sweep(question, lambda text: print(text, flush=True))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{outcome.table}\n\n{outcome.answer.sentence}\n")
    for name in ("pareto.html", "pareto.png", *(["best.yaml"] if outcome.answer.best else [])):
        print(f"  {outcome.folder / name}")
    if outcome.run.ui_command:
        print(f"  see it in MLflow: {outcome.run.ui_command}\n                    then open {outcome.run.page}")
    else:
        print(f"  see it in MLflow: {outcome.run.page}")
    return 0 if outcome.answer.best else 1


def _asked(arguments: argparse.Namespace) -> object:
    from fiited_ray.tune.sweep import Grid, Search, Target

    if arguments.mode == "target":
        return Target(arguments.method, arguments.least, arguments.precision)
    methods, budgets, varied = tuple(arguments.methods.split(",")), parse_budgets(arguments.budgets), parse_vary(arguments.vary)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)}: not among {', '.join(METHODS)}")
    if arguments.mode == "search":
        return Search(methods, budgets, varied, arguments.trials)
    ranges = [key for key, each in {"--budgets": budgets, **varied}.items() if not isinstance(each, Choices)]
    if ranges:
        raise ConfigError(f"{', '.join(ranges)}: a grid takes values, not a range; ranges are for search")
    return Grid(tuple(grid(methods, budgets, varied)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    target, grid_, search = (modes.add_parser(name) for name in ("target", "grid", "search"))
    target.add_argument("--method", default="fiited", choices=[method for method in METHODS if method != FULL])
    target.add_argument("--least", type=_share, default=0.001, help="smallest share of the dense-equivalent bytes to consider (0.1%%)")
    target.add_argument("--precision", type=_factor, default=1.25, help="budgets considered are this factor apart (1.25)")
    for mode, budgets, methods in ((grid_, "50%,25%,12.5%,6.25%", "full,fiited"), (search, "0.5%..50%", "fiited")):
        mode.add_argument("--budgets", default=budgets, help="with commas between; for search also a range (%(default)s)")
        mode.add_argument("--methods", default=methods, help="with commas between (%(default)s), of " + ", ".join(METHODS))
        mode.add_argument("--vary", action="append", default=[], metavar="KEY=VALUES", help="policy.alpha=1.5,2,4; for search also ranges")
    search.add_argument("--trials", type=_count, default=20)
    for mode in (target, grid_, search):
        mode.add_argument("--config", required=True, help="YAML file, such as jobs/configs/synthetic.yaml")
        mode.add_argument("--metric", choices=["auc", "ne"], default="auc", help="what counts as quality (auc)")
        mode.add_argument("--drop", type=float, default=0.001, help="how much of it may be lost against full width (0.001)")
        mode.add_argument("--baseline", type=float, help="its value at full width, where that is known or cannot be trained")
        mode.add_argument("--parallel", type=_count, help="trials at a time; as many as the CPUs hold if left out")
        mode.add_argument("overrides", nargs="*", help="settings such as name=sweep train.workers=1")
    return parser


def _share(text: str) -> float:
    share = Budget.parse(text).share
    if share is None or not share < 1:
        raise argparse.ArgumentTypeError(f"{text}: a share below 100% is wanted")
    return share


def _factor(text: str) -> float:
    factor = float(text)
    if not factor > 1:
        raise argparse.ArgumentTypeError(f"{text}: a factor above 1 is wanted")
    return factor


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is wanted")
    return count


if __name__ == "__main__":
    sys.exit(main())
