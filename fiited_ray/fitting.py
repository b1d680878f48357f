"""Rows of the methods that fix them beforehand: as many, or as long, as the budget holds with everything counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fiited_ray.config import Config, ConfigError
from fiited_ray.methods import fixes_rows, largest_cap, remainders_of
from fiited_ray.store.layout import ShardSpec, check_budget, dense_row_bytes

_MARGIN = 1.03  # the numbers of ids are estimates, 0.8 % on average
_SPARE_ROWS = 8  # for each worker: the room that is left is dealt evenly


def settle(config: Config, distinct: list[int] | None) -> tuple[Config, int | None]:
    """(the configuration with its rows found, bytes of the budget), for tables of so many distinct ids.

    Args:
        distinct: ids of each table in the training data, to about 1 %; needed where the budget is a share, and by `hash`, `qr`, `uniform`.

    Raises:
        ConfigError: for a budget that is too small.
    """
    if config.method == "full":
        return config, None
    budget = config.budget.bytes
    if distinct is not None and config.budget.share is not None:
        budget = int(sum(distinct) * dense_row_bytes(config.embedding) * config.budget.share)
    if fixes_rows(config) and budget is None:
        raise ConfigError(f"budget: method {config.method} fixes its rows by it; name bytes (64MiB) or a share (1/16), not none")
    check_budget(config, budget)
    if distinct is None or budget is None:
        return config, budget
    return fit_rows(config, budget, distinct), budget


def fit_rows(config: Config, budget_bytes: int, distinct: list[int]) -> Config:
    """The configuration with `embedding.rows` and `remainders` (methods `hash` and `qr`) or `embedding.kept_dim` (`uniform`) found.

    What is given already stays. Other methods' configurations are returned as they are.

    Args:
        budget_bytes: of all workers' shards together.
        distinct: ids of each table in the training data, to about 1 %.

    Raises:
        ConfigError: when the method cannot do with so few bytes, naming the smallest budget it can do with.
    """
    if not fixes_rows(config):
        return config
    if config.policy.max_shard_bytes is not None:
        raise ConfigError(f"policy.max_shard_bytes: method {config.method} knows no limit but the budget; leave it out")
    ids = [math.ceil(_MARGIN * count) + 2 for count in distinct]
    if config.method == "uniform":
        return config if config.embedding.kept_dim is not None else _fit_dim(config, budget_bytes, sum(ids))
    return config if config.embedding.rows is not None else _fit_tables(config, budget_bytes, ids)


def rows_within(config: Config, budget_bytes: int) -> int:
    """Rows of all their chunks that the workers' shards hold together."""
    workers = config.train.most_workers
    plans = [ShardSpec.of(config, budget_bytes, rank, workers).plan() for rank in range(workers)]
    return (budget_bytes - sum(fixed for fixed, _ in plans)) // plans[0][1][-1] - _SPARE_ROWS * workers


def _fit_dim(config: Config, budget_bytes: int, ids: int) -> Config:
    def of(dim: int) -> Config:
        return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, kept_dim=dim))

    for dim in range(config.embedding.dim, 0, -1):
        if rows_within(of(dim), budget_bytes) >= ids:
            return of(dim)
    raise _too_few("not even 1 dimension for each of", ids, budget_bytes, lambda budget: rows_within(of(1), budget) >= ids, config)


def _fit_tables(config: Config, budget_bytes: int, ids: list[int]) -> Config:
    least = 2 * len(ids)

    def fits(budget: int) -> bool:
        return rows_within(config, budget) >= least

    if not fits(budget_bytes):
        raise _too_few("not even 2 rows for each table of", sum(ids), budget_bytes, fits, config)
    cap = largest_cap(ids, rows_within(config, budget_bytes))
    shared = {table: count for table, count in zip(config.data.tables, ids, strict=True) if count > cap}
    remainders = {table: remainders_of(count, cap) for table, count in shared.items()} if config.method == "qr" else {}
    counts = {table: cap - remainders.get(table, 0) for table in shared}
    return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, rows=counts, remainders=remainders))


def _too_few(what: str, ids: int, budget_bytes: int, fits: Callable[[int], bool], config: Config) -> ConfigError:
    low, high = budget_bytes, 2 * budget_bytes
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ConfigError(
        f"method {config.method}: {budget_bytes:,} bytes hold {what} {ids:,} ids; the smallest budget it can do with here is {high:,} bytes"
    )
