"""The pictures every run leaves among its artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fiited_ray import plots
from fiited_ray.methods import store_tables

if TYPE_CHECKING:
    from fiited_ray.run_writer import RunWriter
    from fiited_ray.train.loop import Worker


def log_plots(writer: RunWriter, worker: Worker, final: dict[str, float], synthetic: bool) -> None:
    """Draw and log the plots of a finished run; says so where the data are synthetic."""
    history, config = worker.history, worker.config
    steps, values = history.steps, history.at_all_steps()
    title = " (synthetic data)" if synthetic else ""
    writer.figure("plots/bytes.png", plots.bytes_over_time(steps, values, title))
    writer.figure("plots/quality.png", plots.quality_over_time(steps, values, final, title))
    writer.figure("plots/hit_rate.png", plots.hit_rate(steps, values, title))
    writer.figure("plots/time.png", plots.time_by_phase(steps, values, title))
    rows = np.stack(history.widths)
    writer.figure("plots/widths.png", plots.widths_by_table(steps, store_tables(config), rows, worker.spec.chunk, title))
    if history.importance is not None:
        threshold, by_bin = history.importance
        figure = plots.importance_histogram(by_bin, threshold, worker.spec.levels, worker.spec.chunk, worker.spec.importance, title)
        writer.figure("plots/importance.png", figure)
