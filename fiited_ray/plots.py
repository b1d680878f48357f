"""Pictures of a run. Plain numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fiited_ray.policy.histogram import bin_edges

MIB = 2**20
# Okabe and Ito's palette, told apart with any colour vision
BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#999999"
_GROUP = 8  # bins drawn as one, a quarter of an octave
_PARTS = {"payload": BLUE, "optimizer": SKY, "index": ORANGE, "sketch": GREEN, "slack": GREY}

Series = Mapping[str, Sequence[float]]


def bytes_over_time(steps: Sequence[int], values: Series, title: str) -> Figure:
    """Allocated bytes by part, stacked, below the budget."""
    figure, axes = _figure(f"Embedding bytes by part{title}", "step", "MiB")
    stacks = [np.asarray(values[f"bytes/{part}"]) / MIB for part in _PARTS]
    axes.stackplot(steps, stacks, labels=list(_PARTS), colors=list(_PARTS.values()), alpha=0.9)
    if "bytes/budget" in values:
        axes.axhline(values["bytes/budget"][-1] / MIB, color=RED, linestyle="--", label="budget")
    dense = values["bytes/dense_equivalent"][-1] / MIB
    axes.text(0.01, 0.97, f"full-width tables for the ids seen: {dense:,.1f} MiB", transform=axes.transAxes, va="top", fontsize=9)
    axes.set_ylim(0, 1.2 * max(max(np.sum(stacks, 0)), values["bytes/budget"][-1] / MIB if "bytes/budget" in values else 0))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def quality_over_time(steps: Sequence[int], values: Series, final: Mapping[str, float], title: str) -> Figure:
    """AUC and normalised entropy of training batches, each scored before it was learned from; dashed: at the end."""
    figure, axes = _figure(f"Quality{title}", "step", "AUC (higher is better)")
    axes.plot(steps, values["train/auc"], color=BLUE, label="AUC")
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.plot(steps, values["train/ne"], color=ORANGE, label="normalised entropy")
    right.set_ylabel("normalised entropy (lower is better)")
    for name, colour, on in (("eval/auc", BLUE, axes), ("eval/ne", ORANGE, right)):
        if name in final:
            on.axhline(final[name], color=colour, linestyle="--", linewidth=1)
            on.annotate(
                f"test {final[name]:.4f}",
                (1, final[name]),
                xycoords=on.get_yaxis_transform(),
                color=colour,
                fontsize=9,
                bbox={"color": "white", "alpha": 0.8, "pad": 1},
                va="bottom",
                ha="right",
            )
    axes.set_xlim(right=steps[-1] + 0.12 * (steps[-1] - steps[0]) + 1)  # room for the names of the dashed lines
    lines = [*axes.get_lines()[:1], *right.get_lines()[:1]]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return figure


def widths_by_table(tables: Sequence[str], rows: np.ndarray, title: str) -> Figure:
    """Share of each table's rows by width. rows: int64 [tables, chunks]."""
    figure, axes = _figure(f"Rows by width{title}", "share of the table's rows", "", height=1.2 + 0.27 * len(tables))
    totals = np.maximum(rows.sum(1), 1)
    left = np.zeros(len(tables))
    shades = np.linspace(0.25, 1.0, rows.shape[1])
    for chunk in range(rows.shape[1]):
        share = rows[:, chunk] / totals
        axes.barh(range(len(tables)), share, left=left, color=BLUE, alpha=shades[chunk], label=f"{chunk + 1} chunk{'s' if chunk else ''}")
        left += share
    axes.set_yticks(range(len(tables)), [f"{table} ({count:,})" for table, count in zip(tables, rows.sum(1), strict=True)], fontsize=8)
    axes.set_ylim(len(tables) - 0.5, -0.5)  # the first table on top
    axes.set_xlim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def importance_histogram(rows: np.ndarray, threshold: float, levels: Sequence[float], title: str) -> Figure:
    """Rows by importance, and where the widths are cut. rows: int64 [2048], before the round."""
    figure, axes = _figure(
        f"Importance of resident rows at the last round{title}", "importance (decayed sum of frequency x gradient norm)", "rows per octave"
    )
    edges = bin_edges()[_GROUP::_GROUP]  # without the first group, which holds 0
    grouped = rows.reshape(-1, _GROUP).sum(1)[1:] / np.diff(np.log2(edges))  # bins are even within an octave, not on a log axis
    used = np.flatnonzero(grouped)
    if len(used):
        first, last = used[0], used[-1] + 1
        axes.stairs(grouped[first:last], edges[first : last + 1], color=BLUE, fill=False)
        axes.stairs(grouped[first:last], edges[first : last + 1], color=SKY, fill=True, alpha=0.5)
        axes.set_ylim(0, 1.7 * grouped.max())  # room for the names of the lines
    axes.set_xscale("log")
    for width, level in enumerate(levels, 1):
        if threshold > 0:
            axes.axvline(threshold * level, color=RED, linewidth=1.5 if width == 1 else 0.8, linestyle="-" if width == 1 else ":")
            name = f"width 1: threshold {threshold:.2g}" if width == 1 else f"width {width}"
            axes.annotate(
                name,
                (threshold * level, 0.99),
                xycoords=("data", "axes fraction"),
                color=RED,
                fontsize=8,
                rotation=90,
                va="top",
                ha="right",
            )
    return figure


def hit_rate(steps: Sequence[int], values: Series, title: str) -> Figure:
    """Share of lookups that found a row, and rows resident."""
    figure, axes = _figure(f"Lookups that find a row{title}", "step", "share of lookups")
    found = axes.plot(steps, values["lookup/hit_rate"], color=GREEN, label="share of lookups")
    axes.set_ylim(0, 1.02)
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    resident = right.plot(steps, values["rows/total"], color=GREY, label="rows resident")
    right.set_ylabel("rows resident")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(handles=[*found, *resident], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return figure


def time_by_phase(steps: Sequence[int], values: Series, title: str) -> Figure:
    """Milliseconds a step spends in each phase, on rank 0."""
    figure, axes = _figure(f"Time by phase{title}", "step", "ms per step")
    order = ("time/data", "time/wait", "time/route", "time/gather", "time/model", "time/update", "time/round")
    phases = [name for name in order if name in values]  # data, or wait where it is read and routed ahead
    stacks = [1000 * np.nan_to_num(np.asarray(values[name])) for name in phases]
    axes.stackplot(steps, stacks, labels=[name.removeprefix("time/") for name in phases], colors=[GREY, ORANGE, SKY, BLUE, GREEN, RED])
    axes.set_ylim(0, 1.25 * float(np.quantile(np.sum(stacks, 0), 0.9)))  # the first steps wait for the data to start
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _figure(title: str, x: str, y: str, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
