"""Pictures of a run. Plain numbers in, matplotlib figures out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fiited_ray.policy import bin_edges, width_of

MIB = 2**20
# Okabe and Ito's palette, told apart with any colour vision
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999"
_SHADES = colormaps["YlGnBu"]  # few to many dimensions
_GROUP = 8  # bins drawn as one, a quarter of an octave
_PARTS = {"payload": BLUE, "optimizer": SKY, "index": ORANGE, "sketch": GREEN, "slack": GREY}
# data, or wait where it is read and routed ahead; both where a resume changed that
_PHASES = {"data": GREY, "wait": PURPLE, "route": ORANGE, "gather": SKY, "model": BLUE, "update": GREEN, "round": RED}

_IMPORTANCE = {
    "frequency_x_norm": "decayed sum of frequency x gradient norm",
    "norm": "decayed sum of gradient norms",
    "lookup_norm_sum": "decayed sum of the lookups' gradient norms",
    "frequency": "decayed number of lookups",
}

Series = Mapping[str, Sequence[float]]


def bytes_over_time(steps: Sequence[int], values: Series, title: str) -> Figure:
    """Allocated bytes by part, stacked, below the budget that is in force at the last step."""
    figure, axes = _figure(f"Embedding bytes by part{title}", "step", "MiB")
    stacks = [np.asarray(values[f"bytes/{part}"]) / MIB for part in _PARTS]
    names = [f"{part} {stack[-1]:,.1f} MiB" for part, stack in zip(_PARTS, stacks, strict=True)]
    axes.stackplot(steps, stacks, labels=names, colors=list(_PARTS.values()), alpha=0.9)
    budget = values["bytes/budget"][-1] / MIB if "bytes/budget" in values else math.nan
    if not math.isnan(budget):  # as it is where a resume gave it up
        axes.axhline(budget, color=RED, linestyle="--", label=f"budget {budget:,.1f} MiB")
    dense, total = values["bytes/dense_equivalent"][-1] / MIB, float(np.sum(stacks, 0)[-1])
    text = f"{total:,.1f} MiB in all; full-width tables for the ids seen: {dense:,.1f} MiB ({total / max(dense, 1e-9):.1%})"
    axes.text(0.01, 0.97, text, transform=axes.transAxes, va="top", fontsize=9)
    axes.set_ylim(0, 1.2 * float(np.nanmax([*np.sum(stacks, 0), budget])))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # in the order of the stack
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


def widths_by_table(steps: Sequence[int], tables: Sequence[str], rows: np.ndarray, chunk: int, title: str) -> Figure:
    """Left: mean dimensions of each table's rows over the steps. Right: how its rows divide into widths at the last one.

    rows: int64 [steps, tables, chunks], rows by table and width; a table without a row is left white.
    """
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(tables)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    figure.suptitle(f"Widths by table{title}", x=0.01, ha="left", fontsize=11)
    chunks = rows.shape[2]
    numbers = rows.sum(2)
    with np.errstate(invalid="ignore"):
        mean = (rows * np.arange(1, chunks + 1)).sum(2) * chunk / numbers
    at = np.asarray(steps, np.float64)
    edges = np.concatenate([[at[0] - (at[1] - at[0] if len(at) > 1 else 1)], at])  # a cell is the steps up to its report
    left.pcolormesh(edges, np.arange(len(tables) + 1) - 0.5, mean.T, cmap=_SHADES, vmin=0, vmax=chunk * chunks)
    left.set_title("mean dimensions of a resident row", loc="left", fontsize=10)
    left.set_xlabel("step")
    left.set_yticks(range(len(tables)), tables, fontsize=8)
    start, totals = np.zeros(len(tables)), np.maximum(numbers[-1], 1)
    for width in range(chunks):
        share = rows[-1, :, width] / totals
        colour = _shade((width + 1) / chunks)
        right.barh(range(len(tables)), share, left=start, color=colour, height=0.9, label=f"{(width + 1) * chunk}")
        start += share
    for table, count in enumerate(numbers[-1]):
        right.annotate(f"{count:,}", (1.02, table), va="center", fontsize=8, annotation_clip=False)
    right.set_xlim(0, 1)
    right.set_title(f"rows by dimensions at step {steps[-1]}", loc="left", fontsize=10)
    right.set_xlabel("share of the table's rows; beside it, their number")
    right.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), title="dimensions", loc="outside right upper", fontsize=9, frameon=False)
    left.set_ylim(len(tables) - 0.5, -0.5)  # the first table on top
    return figure


def importance_histogram(rows: np.ndarray, threshold: float, levels: Sequence[float], chunk: int, kind: str, title: str) -> Figure:
    """Rows by importance of a kind, coloured by the width it earns them. rows: int64 [2048], before the round."""
    figure, axes = _figure(f"Importance of resident rows at the last round{title}", f"importance ({_IMPORTANCE[kind]})", "rows per octave")
    edges = bin_edges()
    middles = ((edges[:-1] + edges[1:]) / 2).astype(np.float32)
    widths = width_of(middles, threshold, levels)
    drawn = edges[_GROUP::_GROUP]  # without the first group, which holds 0
    per_octave = np.diff(np.log2(drawn))  # bins are even within an octave, not on a log axis
    below = np.zeros(len(per_octave))
    for width in range(len(levels) + 1):
        mine = np.where(widths == width, rows, 0)
        name = f"{width * chunk} dimensions: {mine.sum():,} rows" if width else f"below the threshold: {mine.sum():,} rows"
        top = below + mine.reshape(-1, _GROUP).sum(1)[1:] / per_octave
        axes.stairs(top, drawn, baseline=below, fill=True, color=_shade(width / len(levels)) if width else GREY, label=name)
        below = top
    used = np.flatnonzero(below)
    axes.set_xscale("log")
    if len(used):
        axes.set_xlim(drawn[max(0, used[0] - 1)], drawn[min(len(drawn) - 1, used[-1] + 2)])
    for number, level in enumerate(levels):
        if threshold > 0:
            axes.axvline(threshold * level, color=RED, linewidth=0.8 if number else 2, linestyle=":" if number else "-")
    if threshold > 0:
        axes.plot([], [], color=RED, linewidth=2, label=f"threshold {threshold:.2g}")
    axes.legend(loc="upper right", fontsize=9, frameon=False)
    return figure


def hit_rate(steps: Sequence[int], values: Series, title: str) -> Figure:
    """Share of lookups that found a row, and rows resident."""
    figure, axes = _figure(f"Lookups that find a row{title}", "step", "share of lookups")
    found = axes.plot(steps, values["lookup/hit_rate"], color=GREEN, label="share of lookups")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.label.set_color(GREEN)
    share = values["lookup/hit_rate"][-1]
    axes.annotate(f"{share:.1%}", (steps[-1], share), xytext=(0, -14), textcoords="offset points", color=GREEN, ha="right", fontsize=9)
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
    phases = [phase for phase in _PHASES if f"time/{phase}" in values]
    stacks = [1000 * np.nan_to_num(np.asarray(values[f"time/{phase}"])) for phase in phases]
    axes.stackplot(steps, stacks, labels=phases, colors=[_PHASES[phase] for phase in phases])
    axes.set_ylim(0, 1.25 * float(np.quantile(np.sum(stacks, 0), 0.9)))  # the first steps wait for the data to start
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _shade(share: float) -> tuple[float, float, float, float]:
    """Colour of rows with this share of all dimensions."""
    return _SHADES(share)


def _figure(title: str, x: str, y: str, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
