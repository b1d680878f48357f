"""Every plot draws what it promises."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from fiited_ray import plots

STEPS = [10, 20, 30]
VALUES = {f"bytes/{part}": [2.0**20, 2.0**21, 2.0**21] for part in ("payload", "optimizer", "index", "sketch", "slack")}
VALUES |= {"bytes/budget": [2.0**24] * 3, "bytes/dense_equivalent": [2.0**27] * 3, "train/auc": [0.6, 0.7, 0.75], "train/ne": [1, 0.9, 0.8]}
VALUES |= {"lookup/hit_rate": [0.5, 0.8, 0.9], "rows/total": [100, 200, 250]}
VALUES |= {f"time/{phase}": [0.01, 0.02, 0.01] for phase in ("data", "route", "gather", "model", "update", "round")}


def texts(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    found = [text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))]
    return " | ".join(found)


@pytest.mark.parametrize(
    ("figure", "wanted"),
    [
        (
            plots.bytes_over_time(STEPS, VALUES, " (synthetic data)"),
            ["MiB", "budget 16.0 MiB", "payload 2.0 MiB", "128.0 MiB (7.8%)", "(synthetic data)"],
        ),
        (
            plots.quality_over_time(STEPS, VALUES, {"eval/auc": 0.77, "eval/ne": 0.79}, " (synthetic data)"),
            ["AUC", "test 0.7700", "test 0.7900"],
        ),
        (
            plots.widths_by_table(STEPS, ["user", "item x user"], np.array([[[9, 9], [3, 1]]] * 2 + [[[5, 1], [0, 0]]]), 8, ""),
            ["user", "item x user", "rows by dimensions at step 30", "6", "0", "8", "16"],
        ),
        (
            plots.importance_histogram(np.ones(2048, np.int64), 2.0**-20, (1.0, 4.0), 8, "frequency", ""),
            [
                "threshold 9.5e-07",
                "below the threshold: 768 rows",
                "8 dimensions: 64 rows",
                "16 dimensions: 1,216 rows",
                "number of lookups",
            ],
        ),
        (plots.hit_rate(STEPS, VALUES, ""), ["share of lookups", "90.0%"]),
        (plots.time_by_phase(STEPS, VALUES, ""), ["route", "round", "ms per step"]),
    ],
)
def test_a_plot_says_what_it_shows(figure: Figure, wanted: list[str]) -> None:
    shown = texts(figure)
    assert [each for each in wanted if each not in shown] == []


def test_an_empty_histogram_can_be_drawn() -> None:
    assert "rows per octave" in texts(plots.importance_histogram(np.zeros(2048, np.int64), 0.0, (1.0,), 4, "norm", ""))


def test_what_a_resume_gave_up_or_changed_leaves_no_budget_and_a_gap() -> None:
    gone, new = [0.01, 0.02, float("nan")], [float("nan")] * 2 + [0.01]
    values = VALUES | {"bytes/budget": [2.0**24, 2.0**24, float("nan")], "time/data": gone, "time/wait": new}
    bytes_, time = plots.bytes_over_time(STEPS, values, ""), plots.time_by_phase(STEPS, values, "")
    assert "budget" not in texts(bytes_)
    assert bytes_.axes[0].get_ylim()[1] == pytest.approx(1.2 * 10)
    assert "data" in texts(time)
    assert "wait" in texts(time)
    colours = [tuple(each.get_facecolor()[0]) for each in time.axes[0].collections]
    assert len(set(colours)) == len(colours) == 7
