"""When rounds are held: close together at first, `interval` apart later, and at once when rows find no room."""

from __future__ import annotations

from fiited_ray.config import PolicyConfig

_PRESSED = 20  # rows that find no room bring a round forward to this fraction of the gap


class RoundSchedule:
    """Every worker keeps one and asks it the same questions, so that all hold the same rounds."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.last_step = 0
        self.rounds = 0
        self._policy = policy

    def due(self, step: int, crowded: bool) -> bool:
        """Whether a round is to be held after this step. `crowded`: rows were turned away for want of room."""
        return step - self.last_step >= (self.shortest_gap if crowded else self.gap)

    @property
    def gap(self) -> int:
        """Steps from the last round to the next one where nothing presses: it doubles with each round until it reaches the interval."""
        return min(self._policy.interval, self.last_step + self._policy.first_round)

    @property
    def shortest_gap(self) -> int:
        """Fewest steps from one round to the next."""
        return max(1, self.gap // _PRESSED)

    def held(self, step: int) -> None:
        """Note a round after `step`."""
        self.last_step = step
        self.rounds += 1
