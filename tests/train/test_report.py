"""What a worker keeps of its reports."""

from __future__ import annotations

import math

import numpy as np

from fiited_ray.train.report import History

ROWS = np.zeros((1, 1), np.int64)


def test_the_latest_values_are_those_of_the_latest_report_alone() -> None:
    history = History()
    history.add(10, {"bytes/total": 1.0, "bytes/budget": 4.0, "train/auc": 0.5}, ROWS)
    history.add(20, {"bytes/total": 2.0, "train/auc": math.nan}, ROWS)
    assert history.last.keys() == {"bytes/total", "train/auc"}
    assert history.last["bytes/total"] == 2.0
    assert math.isnan(history.last["train/auc"])  # reported, and undefined


def test_each_series_has_a_value_at_every_step_wherever_reports_lacked_its_name() -> None:
    history = History()
    reports: list[dict[str, float]] = [
        {"time/data": 1},
        {"time/data": 2, "time/round": 3},
        {"time/wait": 4},
        {"time/wait": 5, "time/round": 6},
    ]
    for step, values in enumerate(reports):
        history.add(step, values, ROWS)
    found = {name: series.tolist() for name, series in history.at_all_steps().items()}
    nan = math.nan
    np.testing.assert_equal(found, {"time/data": [1, 2, nan, nan], "time/round": [nan, 3, nan, 6], "time/wait": [nan, nan, 4, 5]})
