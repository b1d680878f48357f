"""Log lines: JSON with rank and step, without passwords."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fiited_ray.logs import log_folder, logging_as


def test_a_line_has_time_level_rank_step_and_fields_and_no_password(tmp_path: Path) -> None:
    step = iter((4, 5, 6, 7))
    logger = logging.getLogger("fiited_ray.somewhere")
    with logging_as(2, lambda: next(step), tmp_path):
        logger.info("hello %s", "http://user:secret@host", extra={"fields": {"rows": 9}})
        logger.debug("not at this level")
        try:
            raise ValueError("at http://user:secret@host")
        except ValueError:
            logger.exception("failed")
    logger.info("after the end")
    text = (tmp_path / "worker-00002.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert {name: first[name] for name in ("level", "rank", "where", "message", "rows")} == {
        "level": "info",
        "rank": 2,
        "where": "fiited_ray.somewhere",
        "message": "hello http://***@host",
        "rows": 9,
    }
    assert first["time"].endswith("+00:00")
    assert "ValueError" in second["error"]
    assert "secret" not in text


def test_logs_lie_beside_the_run_and_nowhere_for_an_address() -> None:
    assert log_folder("runs", "tiny") == Path.cwd() / "runs" / "tiny" / "logs"
    assert log_folder("s3://bucket/runs", "tiny") is None
