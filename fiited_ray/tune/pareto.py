"""Quality against size, all methods: as a picture, and as a page on which each trial tells of itself."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plotly.subplots import make_subplots

from fiited_ray.plots import BLUE, GREEN, GREY, ORANGE, RED, SKY
from fiited_ray.tune.answer import BYTES, KEPT, MIB, Reference, finished
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.records import Trial

_COLOURS = (BLUE, ORANGE, GREEN, SKY, "#CC79A7", "#F0E442", GREY)
_AXES = ((BYTES, MIB, "MiB, everything counted"), (KEPT, 0.01, "% of the parameters kept"))
_TITLE_WIDTH = 90  # characters
_WORST = "lower is better", "higher is better"


def front(trials: Sequence[Trial], measure: Measure, size: str) -> list[Trial]:
    """Trials that no other beats in both quality and size, from the smallest on."""
    best: list[Trial] = []
    for trial in sorted(finished(trials, measure), key=lambda trial: (trial.metrics[size], measure.lost(trial.metrics[measure.key], 0.0))):
        if not best or measure.lost(trial.metrics[measure.key], best[-1].metrics[measure.key]) < 0:
            best.append(trial)
    return best


def by_method(trials: Sequence[Trial], size: str) -> dict[str, list[Trial]]:
    """Trials of each method, from the smallest on."""
    methods = dict.fromkeys(trial.method for trial in trials)
    return {
        method: sorted((trial for trial in trials if trial.method == method), key=lambda trial: trial.metrics[size]) for method in methods
    }


def picture(trials: Sequence[Trial], measure: Measure, reference: Reference | None, best: Trial | None, title: str) -> Figure:
    """Two panels, by bytes and by parameters; the line joins what nothing beats, the band is what may be lost."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"Quality against size{title}", x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (size, unit, name) in zip(panels, _AXES, strict=True):
        _panel(axes, finished(trials, measure), measure, reference, best, size, unit)
        axes.set_xlabel(name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{measure.label} ({_WORST[measure.name == 'auc']})")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _panel(
    axes: Axes, trials: list[Trial], measure: Measure, reference: Reference | None, best: Trial | None, size: str, unit: float
) -> None:
    if reference is not None:
        ends = sorted((reference.value, reference.value - measure.drop if measure.name == "auc" else reference.value + measure.drop))
        axes.axhline(reference.value, color=GREY, linestyle="--", linewidth=1, label=reference.name)
        axes.axhspan(*ends, color=GREY, alpha=0.2, linewidth=0, label=f"within {measure.drop:g}")
    line = front(trials, measure, size)
    axes.plot(
        [t.metrics[size] / unit for t in line],
        [t.metrics[measure.key] for t in line],
        color=GREY,
        linewidth=1,
        zorder=1,
        label="best of all",
    )
    for (method, points), colour in zip(by_method(trials, size).items(), _COLOURS, strict=False):
        x, y = [t.metrics[size] / unit for t in points], [t.metrics[measure.key] for t in points]
        axes.scatter(x, y, color=colour, s=36, zorder=3, label=method)
        for t, at_x, at_y in zip(points, x, y, strict=True):
            axes.annotate(t.budget if t.budget != "-" else "", (at_x, at_y), (4, -9), textcoords="offset points", fontsize=7, color=colour)
    if best is not None:
        axes.scatter(
            best.metrics[size] / unit, best.metrics[measure.key], s=140, facecolors="none", edgecolors=RED, zorder=4, label="the answer"
        )


def page(trials: Sequence[Trial], measure: Measure, reference: Reference | None, best: Trial | None, title: str, sentence: str) -> str:
    """The same as an HTML file that needs nothing else: hover over a trial, click a method to hide it, drag to look closer."""
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03)
    done = finished(trials, measure)
    for column, (size, unit, name) in enumerate(_AXES, 1):
        line = front(done, measure, size)
        _trace(figure, column, line, measure, size, unit, "best of all", mode="lines", line={"color": GREY, "width": 1}, hoverinfo="skip")
        for (method, points), colour in zip(by_method(done, size).items(), _COLOURS, strict=False):
            told = [_hover(trial, measure, reference) for trial in points]
            _trace(
                figure, column, points, measure, size, unit, method,
                mode="markers", marker={"color": colour, "size": 10}, hovertext=told, hovertemplate="%{hovertext}<extra></extra>",
            )  # fmt: skip
        if best is not None:
            ring = {"color": RED, "size": 18, "symbol": "circle-open", "line": {"width": 2}}
            _trace(figure, column, [best], measure, size, unit, "the answer", mode="markers", marker=ring, hoverinfo="skip")
        if reference is not None:
            worst = reference.value - measure.drop if measure.name == "auc" else reference.value + measure.drop
            figure.add_hline(reference.value, line={"color": GREY, "dash": "dash", "width": 1}, row=1, col=column)
            figure.add_hrect(worst, reference.value, fillcolor=GREY, opacity=0.2, line_width=0, row=1, col=column)
        figure.update_xaxes(title_text=name, type="log", row=1, col=column)
    figure.update_yaxes(title_text=f"{measure.label} ({_WORST[measure.name == 'auc']})", row=1, col=1)
    words = "<br>".join(textwrap.wrap(sentence, _TITLE_WIDTH))
    heading = {"text": f"<b>Quality against size{title}</b><br><sup>{words}</sup>", "x": 0.01, "xanchor": "left"}
    figure.update_layout(
        title=heading, template="plotly_white", margin={"t": 140, "l": 70, "r": 20}, legend={"orientation": "h", "y": -0.2}
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True}))


def _trace(
    figure: go.Figure, column: int, trials: Sequence[Trial], measure: Measure, size: str, unit: float, name: str, **style: object
) -> None:
    x, y = [trial.metrics[size] / unit for trial in trials], [trial.metrics[measure.key] for trial in trials]
    figure.add_trace(go.Scatter(x=x, y=y, name=name, legendgroup=name, showlegend=column == 1, **style), row=1, col=column)


def _hover(trial: Trial, measure: Measure, reference: Reference | None) -> str:
    values = trial.metrics
    lines = [f"<b>{trial.name}</b>", f"{measure.label} {values[measure.key]:.4f}"]
    if reference is not None:
        lines.append(f"loses {measure.lost(values[measure.key], reference.value):+.4f} against {reference.name}")
    lines += [f"{values[BYTES] / MIB:,.2f} MiB, everything counted", f"{values[KEPT]:.2%} of the parameters kept"]
    return "<br>".join(lines)
