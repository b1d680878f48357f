"""What a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fiited_ray.methods import chunk_of, chunks_of

if TYPE_CHECKING:
    from fiited_ray.train.plan import Plan
    from fiited_ray.train.trainer import Outcome

_MIB = 2**20
_OF_RUN = "time_of_run/"  # seconds by phase


def summary(plan: Plan, outcome: Outcome) -> str:
    """A table of quality, bytes, rows and speed, and how to look at the run."""
    values, config = outcome.metrics, plan.config
    lines = ["", f"run {config.name!r}{' on synthetic data' if plan.files.synthetic else ''}"]
    for kind, name in (("eval", "test set"), ("progressive", "each batch before learning from it")):
        if f"{kind}/auc" in values:
            lines.append(
                f"  quality ({name}): AUC {values[f'{kind}/auc']:.4f}, NE {values[f'{kind}/ne']:.4f}, "
                f"log loss {values[f'{kind}/logloss']:.4f}, calibration {values[f'{kind}/calibration']:.3f}"
            )
    lines.append("  embedding memory")
    total = values["bytes/total"]
    for part in ("payload", "optimizer", "index", "sketch", "slack"):
        size = values[f"bytes/{part}"]
        lines.append(f"    {part:<18}{size / _MIB:>10.2f} MiB {size / total:>7.1%}")
    lines.append(f"    {'total':<18}{total / _MIB:>10.2f} MiB")
    if "bytes/budget" in values:
        budget, peak = values["bytes/budget"], values["bytes/peak_of_run"]
        lines.append(f"    {'most at any step':<18}{peak / _MIB:>10.2f} MiB {peak / budget:>7.1%} of the budget")
        lines.append(f"    {'budget':<18}{budget / _MIB:>10.2f} MiB")
    dense = values["bytes/dense_equivalent"]
    lines.append(f"    {'dense equivalent':<18}{dense / _MIB:>10.2f} MiB  full width for the ids seen, with optimizer state")
    lines.append(
        f"  bytes are {total / dense:.2%} of the dense equivalent; {1 - values['parameters/kept_share']:.2%} of the parameters are gone"
    )
    chunk = chunk_of(config)
    widths = [f"{width * chunk} dims: {values[f'rows/width_{width}']:,.0f}" for width in range(1, chunks_of(config) + 1)]
    lines.append(f"  rows {values['rows/total']:,.0f} ({', '.join(widths)})")
    lines.append(f"  training {values['speed/samples_per_s_of_run']:,.0f} samples/s with {values['run/workers']:.0f} worker(s)")
    lines += _slowest(values) + _left_out(values)
    lines.append(f"  model {outcome.model_folder}")
    if outcome.run.ui_command:
        lines.append(f"  see it in MLflow: {outcome.run.ui_command}")
        lines.append(f"                    then open {outcome.run.page}")
    else:
        lines.append(f"  see it in MLflow: {outcome.run.page}")
    return "\n".join(lines)


def _slowest(values: Mapping[str, float]) -> list[str]:
    """The phase that took most of rank 0's time."""
    seconds = {name.removeprefix(_OF_RUN): value for name, value in values.items() if name.startswith(_OF_RUN)}
    if not seconds:
        return []
    slowest = max(seconds, key=lambda phase: seconds[phase])
    share = seconds[slowest] / max(1e-9, sum(seconds.values()))
    return [f"  slowest phase {slowest}: {seconds[slowest]:,.1f} s, {share:.0%} of rank 0's time"]


def _left_out(values: Mapping[str, float]) -> list[str]:
    names = {"data/skipped_rows": "bad rows", "train/skipped_steps": "steps", "train/skipped_bags": "bags that are not finite"}
    counts = [f"{values[name]:,.0f} {words}" for name, words in names.items() if values.get(name)]
    return [f"  left out: {', '.join(counts)}"] if counts else []
