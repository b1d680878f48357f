"""Make Parquet data sets.

    python jobs/prepare.py synthetic --output data/synthetic
    python jobs/prepare.py criteo --input train.txt --output data/criteo
    python jobs/prepare.py criteo --input day_0.gz day_1.gz --output data/terabyte
    python jobs/prepare.py avazu --input train.gz --output data/avazu --split last-day

Text may be plain, gzip or zstd. The last rows become test.parquet (`--split`, a share of the rows).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fiited_ray.data import DataError
from fiited_ray.data.convert import FORMATS, convert
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        if given.kind == "synthetic":
            spec = SyntheticSpec(given.rows, given.split, given.seed, given.skew, given.drift, given.preference_drift)
            paths = write_synthetic(given.output, spec, given.group_rows)
            print(f"wrote {spec.rows:,} synthetic rows: {', '.join(map(str, paths))}")
        else:
            form = FORMATS[given.kind]()
            limits = {"max_rejected": given.max_rejected, "max_rows": given.max_rows, "group_rows": given.group_rows}
            print(convert(given.input, given.output, form, split=given.split, **limits))
    except (DataError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    synthetic = kinds.add_parser("synthetic", help="Criteo-shaped rows with planted signal and drift")
    synthetic.add_argument("--rows", type=int, default=SyntheticSpec.rows)
    synthetic.add_argument("--split", type=_share, default=SyntheticSpec.test_share, help="share of the last rows that become the test set")
    synthetic.add_argument("--seed", type=int, default=SyntheticSpec.seed)
    synthetic.add_argument("--skew", type=float, default=SyntheticSpec.skew, help="exponent of the power law of ids")
    synthetic.add_argument(
        "--drift", type=float, default=SyntheticSpec.drift, help="how often a rank of popularity goes to a new id, from first to last row"
    )
    synthetic.add_argument(
        "--preference-drift", type=float, default=SyntheticSpec.preference_drift, help="quarter turns of what ids mean for the label"
    )
    for name in FORMATS:
        text = kinds.add_parser(name, help=f"{name.capitalize()}'s click log")
        text.add_argument("--input", type=Path, nargs="+", required=True, help="text files, in order of time")
        text.add_argument("--split", type=_split, default=0.1, help="share of the last rows that become the test set, or last-day (avazu)")
        text.add_argument("--max-rejected", type=_share, default=0.01, help="largest share of unreadable lines (default 0.01)")
        text.add_argument("--max-rows", type=int, help="stop after so many rows")
    for kind in kinds.choices.values():
        kind.add_argument("--output", type=Path, required=True, help="folder of train.parquet and test.parquet")
        kind.add_argument(
            "--group-rows", type=_count, help="most rows of a row group; for many workers as many as one has of train.batch_size"
        )
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 0 and below 1 is wanted")
    return share


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is wanted")
    return count


def _split(text: str) -> float | str:
    return text if text == "last-day" else _share(text)


if __name__ == "__main__":
    sys.exit(main())
