"""When rounds are held: close together at first, `interval` apart later, and at once when rows find no room.

Where rows never stop finding none, rounds stay as close as at first. Leaving five steps between them later on took them from 13 to 8 %
of the time of goodbooks at 1/16, but did not follow drift (`benchmarks/drift.py`): AUC of the last half 0.7619 for 0.7788, and 0.6103 for
0.7837 with a fast decay.
"""

from __future__ import annotations

from fiited_ray.config import PolicyConfig

_PRESSED = 20  # rows that find no room bring a round forward to this fraction of the gap


class RoundSchedule:
    """Every worker keeps one and asks it the same questions, so that all hold the same rounds."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.gap = policy.first_round
        self.last_step = 0
        self.rounds = 0
        self._interval = policy.interval

    def due(self, step: int, crowded: bool) -> bool:
        """Whether a round is to be held after this step. `crowded`: rows were turned away for want of room."""
        passed = step - self.last_step
        return passed >= self.gap or (crowded and passed >= self.shortest_gap)

    @property
    def shortest_gap(self) -> int:
        """Fewest steps from one round to the next."""
        return max(1, self.gap // _PRESSED)

    def held(self, step: int) -> None:
        """Note a round after `step`. Once one comes in its own time, the next gap doubles until it reaches the interval."""
        if step - self.last_step >= self.gap:
            self.gap = min(self._interval, 2 * self.gap)
        self.last_step = step
        self.rounds += 1
