"""The smallest budget that is good enough, in as few trials as possible: bisection over a ladder of budgets.

Quality is taken to rise with the budget. Of n budgets the answer is known after ceil(log2(n + 1)) trials, which no other way beats in
the worst case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from fiited_ray.tune.space import Settings


def ladder(least: float, precision: float) -> list[float]:
    """Shares of the dense-equivalent bytes from `least` to just below 1, rising by the factor `precision`."""
    shares = []
    share = 1 / precision
    while share > least * (1 + 1e-9):
        shares.append(share)
        share /= precision
    return [least, *reversed(shares)]


def next_step(steps: int, within: Collection[int], outside: Collection[int]) -> int | None:
    """Which of `steps` budgets, from the smallest on, to try next; None when the smallest good one is known.

    Args:
        within: budgets whose quality is good enough; full width, above all steps, always is.
        outside: those whose quality is not, or that could not be trained.
    """
    high = min(within, default=steps)
    low = max((step for step in outside if step < high), default=-1)
    return None if high - low <= 1 else (low + high) // 2


class BudgetBisection(Searcher):
    """Ray Tune's view of the bisection: one trial at a time, each decided by the results before it."""

    def __init__(self, trials: Sequence[Settings], good_enough: Callable[[Mapping[str, float]], bool], metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._trials = list(trials)  # from the smallest budget to the largest
        self._good_enough = good_enough
        self._running: dict[str, int] = {}
        self._within: set[int] = set()
        self._outside: set[int] = set()

    def suggest(self, trial_id: str) -> Any:
        if self._running:
            return None  # the next budget follows from this one's result
        step = next_step(len(self._trials), self._within, self._outside)
        if step is None:
            return Searcher.FINISHED
        self._running[trial_id] = step
        return {"settings": self._trials[step]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        step = self._running.pop(trial_id)
        good = not error and result is not None and self._good_enough(result)
        (self._within if good else self._outside).add(step)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps({"within": sorted(self._within), "outside": sorted(self._outside)}))

    def restore(self, checkpoint_path: str) -> None:
        state = json.loads(Path(checkpoint_path).read_text())
        self._within, self._outside, self._running = set(state["within"]), set(state["outside"]), {}
