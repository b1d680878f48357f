"""What a sweep says in the end: the smallest trial that is good enough, in one sentence, and a table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fiited_ray.tune.measure import Measure
from fiited_ray.tune.records import Trial
from fiited_ray.tune.seeds import SEED, SPREAD, without_seed
from fiited_ray.tune.space import BUDGET, FULL, METHOD

MIB = 2**20
BYTES, KEPT, DENSE, SPEED = "bytes/total", "parameters/kept_share", "bytes/dense_equivalent", "speed/samples_per_s_of_run"


@dataclass(frozen=True)
class Reference:
    """What quality is compared with: full width, or the best trial where that was not trained."""

    value: float
    name: str

    @staticmethod
    def of(trials: Sequence[Trial], measure: Measure, known: float | None = None) -> Reference | None:
        """Of the baseline among the trials (the one without other settings), or of `known`, its value; None where nothing has finished."""
        if known is not None:
            return Reference(known, "full width")
        scored = finished(trials, measure)
        for trial in scored:
            if without_seed(trial.settings).keys() == {METHOD, BUDGET} and trial.method == FULL:
                return Reference(trial.metrics[measure.key], "full width")
        best = max(scored, key=lambda trial: -measure.lost(trial.metrics[measure.key], 0.0), default=None)
        return None if best is None else Reference(best.metrics[measure.key], "the best trial")


@dataclass(frozen=True)
class Answer:
    """The trial to take, and the sentence that says why."""

    best: Trial | None  # None where no trial has finished
    sentence: str


def finished(trials: Sequence[Trial], measure: Measure) -> list[Trial]:
    """Trials that ran to their end and were scored."""
    return [
        trial
        for trial in trials
        if trial.state == "finished" and trial.metrics.get(measure.key, float("nan")) == trial.metrics.get(measure.key)
    ]


def answer(trials: Sequence[Trial], measure: Measure, reference: Reference | None, where: str = "") -> Answer:
    """The trial of least bytes whose quality is close enough to the reference's, or else the one that is closest.

    Args:
        where: of what data, such as ` on synthetic data`.
    """
    candidates = [trial for trial in finished(trials, measure) if trial.method != FULL]
    if reference is None or not candidates:
        return Answer(None, f"No trial with a budget has finished{where}: there is nothing to choose from.")
    good = [trial for trial in candidates if measure.within(trial.metrics, reference.value)]
    allowed = f"within {measure.drop:g} {measure.label} of {reference.name} ({reference.value:.4f})"
    if not good:
        best = min(candidates, key=lambda trial: measure.lost(trial.metrics[measure.key], reference.value))
        lost = measure.lost(best.metrics[measure.key], reference.value)
        return Answer(best, f"No trial is {allowed}{where}; {_told(best, measure)} comes closest and loses {lost:.4f}.")
    best = min(good, key=lambda trial: trial.metrics[BYTES])
    sentence = f"{_told(best, measure)} is the smallest {allowed}{where}"
    smaller = [trial for trial in candidates if trial.metrics[BYTES] < best.metrics[BYTES] and trial.method == best.method]
    if smaller:
        next_ = max(smaller, key=lambda trial: trial.metrics[BYTES])
        lost = measure.lost(next_.metrics[measure.key], reference.value)
        sentence += f"; the next smaller one, {next_.name} ({next_.metrics[BYTES] / MIB:,.1f} MiB), loses {lost:.4f}"
    return Answer(best, sentence + ".")


def _told(trial: Trial, measure: Measure) -> str:
    values = trial.metrics
    share = f", {values[BYTES] / values[DENSE]:.2%} of full-width tables" if values.get(DENSE) else ""
    quality = f"{measure.label} {values[measure.key]:.4f}"
    if measure.key + SPREAD in values:
        quality += f" ± {values[measure.key + SPREAD]:.4f} over {len(trial.settings[SEED])} seeds"
    return f"{trial.name} ({values[BYTES] / MIB:,.1f} MiB, everything counted{share}; {quality})"


def table(trials: Sequence[Trial], measure: Measure, reference: Reference | None, best: Trial | None) -> str:
    """All trials in Markdown, from the most bytes to the least; `*` marks the one to take."""
    head = ["trial", "state", "AUC", "NE", f"{measure.label} lost", "parameters kept", "MiB, everything", "of full width", "samples/s"]
    rows = [head, *(_row(trial, measure, reference, trial is best) for trial in sorted(trials, key=_order))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join(("-" * (width + 2)) if not at else "-" * (width + 1) + ":" for at, width in enumerate(widths)) + "|")
    return "\n".join(lines)


def _order(trial: Trial) -> tuple[float, str]:
    return (-trial.metrics.get(BYTES, 0.0), trial.name)


def _row(trial: Trial, measure: Measure, reference: Reference | None, taken: bool) -> list[str]:
    values = trial.metrics

    def show(key: str, form: str, scale: float = 1.0) -> str:
        if key not in values:
            return "-"
        spread = f" ± {values[key + SPREAD] / scale:{form}}" if key + SPREAD in values else ""
        return format(values[key] / scale, form) + spread

    quality = values.get(measure.key)
    lost = "-" if quality is None or reference is None else f"{measure.lost(quality, reference.value):+.4f}"
    share = f"{values[BYTES] / values[DENSE]:.2%}" if values.get(DENSE) and BYTES in values else "-"
    return [
        f"{trial.name} *" if taken else trial.name,
        trial.state if not trial.error else f"{trial.state}: {trial.error.replace('|', '/')[:60]}",
        show(f"{measure.scored}/auc", ".4f"),
        show(f"{measure.scored}/ne", ".4f"),
        lost,
        show(KEPT, ".2%"),
        show(BYTES, ",.1f", MIB),
        share,
        show(SPEED, ",.0f"),
    ]
