"""The methods that `method` chooses from: what each makes of the configuration. All of them use one store and one training loop.

    fiited      rows have a width of their own; the chunks of the highest importance stay      arXiv 2401.04408
    adaembed    the rows of the highest frequency x gradient norm stay, whole                  OSDI 2023
    frequency   the rows of the highest decayed number of lookups stay, whole                  TorchRec, itep_modules.py
    hash        ids modulo a number of rows share rows                                         DLRM, --max-ind-range
    qr          an id's vector is the product of two shared rows, quotient's and remainder's   arXiv 1909.02107
    uniform     all rows have the same smaller dimension
    full        all rows stay, whole; there is no budget

The first three decide anew all through training. `hash`, `qr` and `uniform` fix their rows beforehand (`fiited_ray/fitting.py`).
This module is light: it is imported before torch is.
"""

from __future__ import annotations

from fiited_ray.config import Budget, Config

_WHOLE_ROWS = ("adaembed", "frequency")


def budget_of(config: Config) -> Budget:
    """The budget in force: none for `full`, whatever is configured."""
    return Budget() if config.method == "full" else config.budget


def fixes_rows(config: Config) -> bool:
    """Whether the number of rows and their dimension follow from the budget and the number of ids, before training."""
    return config.method in ("hash", "qr", "uniform")


def shares_rows(config: Config) -> bool:
    """Whether several ids have one row, so that the store cannot count the ids."""
    return config.method in ("hash", "qr")


def chunk_of(config: Config) -> int:
    """Dimensions that a row keeps or drops together."""
    if config.method == "uniform":
        return config.embedding.kept_dim or config.embedding.dim
    return config.embedding.dim if config.method in _WHOLE_ROWS else config.embedding.chunk


def chunks_of(config: Config) -> int:
    """Chunks of a row that has all of them."""
    return 1 if config.method == "uniform" else config.embedding.dim // chunk_of(config)


def importance_of(config: Config) -> str:
    """Kind of importance that rows earn."""
    return {"adaembed": "frequency_x_norm", "frequency": "frequency"}.get(config.method, config.policy.importance)


def store_tables(config: Config) -> tuple[str, ...]:
    """Names of the store's tables: the configured ones; with `qr`, behind them, those of the remainders."""
    return (*config.data.tables, *(f"{table} (remainders)" for table in split_tables(config)))


def split_tables(config: Config) -> tuple[str, ...]:
    """With `qr`, the tables whose rows are products, in the order of the tables."""
    if config.method != "qr":
        return ()
    return tuple(table for table in config.data.tables if table in (config.embedding.rows or {}))


def largest_cap(ids: list[int], rows: int) -> int:
    """The most rows a table may have if tables of `ids` ids each are to have `rows` in all, none more than its ids."""
    left = rows
    for at, count in enumerate(sorted(ids)):
        part = left // (len(ids) - at)
        if count > part:
            return part
        left -= count
    return max(ids)


def remainders_of(ids: int, rows: int) -> int:
    """Remainders m of a table of `rows` rows: with its quotients, rows - m, they make at least `_SPREAD` pairs for each id.

    Shi et al. number the ids and take |S| / m + m rows, so that no two ids have the same pair. Here ids have no numbers but hashes,
    spread over more pairs than there are ids. Where there are too few rows for that, both tables are as large and pairs as many as can be.
    """
    inner = rows * rows - 4 * _SPREAD * ids
    return max(1, min(rows // 2, -int(-(rows - max(0, inner) ** 0.5) // 2)))


_SPREAD = 16  # pairs for each id: about one id in 16 then has its pair with another one
