"""Structured logs: one JSON object a line, with time, level, rank and step, on stderr and in OUTPUT/NAME/logs.

Whatever the package says with `logging` goes there; `extra={"fields": {...}}` adds keys of its own to a line.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fiited_ray.credentials import mask_addresses


def log_folder(output: str, name: str) -> Path | None:
    """Where a run's logs lie; None where the output is an address: then stderr, which Ray keeps, has them alone."""
    return None if "://" in output else Path(output).absolute() / name / "logs"


@contextmanager
def logging_as(rank: int, step: Callable[[], int], folder: Path | None, debug: bool = False) -> Iterator[None]:
    """Write what the package logs as lines of JSON while this lasts.

    Args:
        rank: of this worker.
        step: the step the worker is at.
        folder: gets worker-RANK.jsonl; lines are added to what stands there.
        debug: write debug messages, too.
    """
    logger = logging.getLogger("fiited_ray")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"worker-{rank:05d}.jsonl", encoding="utf-8"))
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(_Json(rank, step))
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        for handler in handlers:
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()


class _Json(logging.Formatter):
    def __init__(self, rank: int, step: Callable[[], int]) -> None:
        super().__init__()
        self._rank, self._step = rank, step

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "rank": self._rank,
            "step": self._step(),
            "where": record.name,
            "message": mask_addresses(record.getMessage()),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = mask_addresses("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line, ensure_ascii=False, default=str)
