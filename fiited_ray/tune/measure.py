"""What counts as quality, and how much of it may be lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fiited_ray.config import Config


@dataclass(frozen=True)
class Measure:
    """One metric of a run, and the loss against full width that is tolerated."""

    name: Literal["auc", "ne"]
    scored: Literal["eval", "progressive"]  # the test set, or each training batch before it was learned from
    drop: float  # AUC may fall, or NE rise, by this much

    @staticmethod
    def of(config: Config, name: Literal["auc", "ne"], drop: float) -> Measure:
        return Measure(name, "eval" if config.data.test else "progressive", drop)

    @property
    def key(self) -> str:
        """The metric's name in a run."""
        return f"{self.scored}/{self.name}"

    @property
    def mode(self) -> Literal["max", "min"]:
        return "max" if self.name == "auc" else "min"

    @property
    def label(self) -> str:
        return self.name.upper()

    def lost(self, value: float, baseline: float) -> float:
        """How much worse than the baseline a value is; below 0 where it is better."""
        return baseline - value if self.name == "auc" else value - baseline

    def within(self, metrics: Mapping[str, float], baseline: float) -> bool:
        """Whether a run's quality is close enough to the baseline's; NaN is not."""
        return self.lost(metrics.get(self.key, float("nan")), baseline) <= self.drop
