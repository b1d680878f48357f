"""The methods that `method` chooses from: what each makes of the configuration. All of them use one store and one training loop.

    fiited      rows have a width of their own; the chunks of the highest importance stay      arXiv 2401.04408
    adaembed    the rows of the highest frequency x gradient norm stay, whole                  OSDI 2023
    frequency   the rows of the highest decayed number of lookups stay, whole                  TorchRec, itep_modules.py
    full        all rows stay, whole; there is no budget

This module is light: it is imported before torch is.
"""

from __future__ import annotations

from fiited_ray.config import Config

_WHOLE_ROWS = ("adaembed", "frequency")


def chunk_of(config: Config) -> int:
    """Dimensions that a row keeps or drops together."""
    return config.embedding.dim if config.method in _WHOLE_ROWS else config.embedding.chunk


def importance_of(config: Config) -> str:
    """Kind of importance that rows earn."""
    return {"adaembed": "frequency_x_norm", "frequency": "frequency"}.get(config.method, config.policy.importance)
