"""What can be known before Ray starts: that the files fit the configuration, and how many bytes there are to share out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fiited_ray.config import Config, ConfigError
from fiited_ray.data.errors import DataError
from fiited_ray.data.files import Files, check_files, check_same_ids, is_sorted
from fiited_ray.methods import fixes_rows
from fiited_ray.tracking_address import absolute_uri, check_address


@dataclass(frozen=True)
class Plan:
    """What is known before any worker starts."""

    config: Config
    files: Files
    test_files: Files | None
    budget_bytes: int | None
    distinct_ids: int | None  # counted only where the budget is a share, or where the method needs it
    dense_equivalent_bytes: int | None

    def describe(self) -> str:
        budget = "none" if self.budget_bytes is None else f"{self.budget_bytes / 2**20:.2f} MiB"
        rows, all_rows = self.files.first_rows(self.config.data.max_rows), self.files.total_rows
        of = "" if rows == all_rows else f" of {all_rows:,}"
        lines = [f"training rows {rows:,}{of}{' (synthetic)' if self.files.synthetic else ''}, embedding budget {budget}"]
        if self.dense_equivalent_bytes is not None:
            share = (self.budget_bytes or 0) / self.dense_equivalent_bytes
            lines.append(
                f"{self.distinct_ids:,} distinct ids (+-1 %): full-width tables and optimizer state would take "
                f"{self.dense_equivalent_bytes / 2**20:.2f} MiB; the budget is {share:.2%} of that"
            )
        return "\n".join(lines)


def make_plan(config: Config, ids_by_table: list[int] | None = None) -> Plan:
    """Check files, budget and the tracking store's address.

    Args:
        ids_by_table: what `count_ids` gives, where that has been counted before.

    Raises:
        DataError: for files that cannot be used.
        ConfigError: for a budget below the smallest possible one, a device that is not supported, or no place to write the run to.
    """
    if config.train.use_gpu and config.method == "qr":
        raise ConfigError("train.use_gpu: method qr numbers its rows on the CPU only; set it to false, or take method hash")
    files = check_files(config.data.train, config.data)
    test_files = check_files(config.data.test, config.data, "data.test") if config.data.test else None
    if test_files:
        check_same_ids(test_files, files.text_ids, files.paths[0])
    elif not config.train.progressive:
        raise ConfigError("data.test is empty and train.progressive is false: nothing would be scored; set one of them")
    for role, each in (("data.train", files), ("data.test", test_files)):
        if each and config.data.time and config.data.reader == "arrow" and not is_sorted(each, config.data.time):
            raise DataError(f"{role} is not in the order of {config.data.time!r} (data.time); sort the files, or let data.reader=ray sort")
    # from here on torch is needed, which takes seconds to import: a misspelt column should not wait for it
    from fiited_ray.fitting import settle
    from fiited_ray.store.layout import dense_row_bytes

    by_table = None
    if config.method != "full" and (config.budget.share is not None or fixes_rows(config)):
        by_table = ids_by_table if ids_by_table is not None else count_ids(config, files)
    config, budget = settle(config, by_table)
    distinct = None if by_table is None else sum(by_table)
    dense_equivalent = None if distinct is None else distinct * dense_row_bytes(config.embedding)
    check_address(absolute_uri(config.tracking.uri))
    try:
        if "://" not in config.output:
            Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {config.output} cannot be made: {error.strerror}; name a folder that can be written") from None
    return Plan(config, files, test_files, budget, distinct, dense_equivalent)


def count_ids(config: Config, files: Files) -> list[int]:
    """Distinct ids of each table in the training data, to about 1 %."""
    from fiited_ray.data.statistics import count_distinct

    print("counting distinct ids ...", flush=True)
    return count_distinct(files, config.data, config.data.max_rows)
