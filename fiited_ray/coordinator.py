"""The coordinator: an actor that hears what all shards report and decides for all of them. A thin shell over `policy`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from fiited_ray.config import PolicyConfig
from fiited_ray.policy import Decision, RoundState, ShardReport, decide

WAIT_SECONDS = 60.0  # for an answer; then the round is skipped
_TELEMETRY = 1000
_log = logging.getLogger(__name__)


class Decider(Protocol):
    """Where the first worker takes the reports. None: no decision could be had, the round is skipped."""

    def decide(self, step: int, reports: Sequence[ShardReport], state: RoundState) -> Decision | None: ...


class LocalDecider:
    """Decides in the first worker's own process, without an actor."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.policy = policy

    def decide(self, step: int, reports: Sequence[ShardReport], state: RoundState) -> Decision | None:
        return decide(reports, state, self.policy)


class Coordinator:
    """The actor's body. It keeps nothing that the next round needs: after a crash Ray restarts it and the next round proceeds."""

    def __init__(self, policy: PolicyConfig) -> None:
        self._policy = policy
        self._stop = ""
        self._telemetry: list[dict[str, float]] = []
        self._progress = ""

    def decide(self, step: int, reports: Sequence[ShardReport], state: RoundState) -> Decision:
        """The decision of the round after `step`.

        Raises:
            ConfigError: for a budget or ceiling that does not hold the least.
        """
        start = time.perf_counter()
        decision = decide(reports, state, self._policy)
        self._telemetry.append(
            {
                "step": step,
                "threshold": decision.threshold,
                "planned_bytes": decision.planned_bytes,
                "changed_bytes": decision.changed_bytes,
                "skipped": float(decision.skipped),
                "rows": sum(int(report.histogram[0].sum()) for report in reports),
                "seconds": time.perf_counter() - start,
            }
        )
        del self._telemetry[:-_TELEMETRY]
        return decision

    def tell(self, progress: str) -> None:
        """Note a line for the person who watches the run."""
        self._progress = progress

    def progress(self) -> str:
        return self._progress

    def stop(self, why: str) -> None:
        """Ask the workers to save and end."""
        self._stop = why

    def stopping(self) -> str:
        """Why the workers are to end; empty while they are not."""
        return self._stop

    def telemetry(self) -> list[dict[str, float]]:
        """The last 1000 decisions: step, threshold, planned and changed bytes, skipped, rows, seconds."""
        return self._telemetry


def start_coordinator(policy: PolicyConfig) -> Any:
    """Start the actor; Ray restarts it whenever it dies."""
    return ray.remote(Coordinator).options(max_restarts=-1, max_task_retries=0, num_cpus=0).remote(policy)


class RemoteDecider:
    """The first worker's line to the coordinator. It never hangs: what goes wrong there, or lasts too long, is a round without decision."""

    def __init__(self, actor: Any, wait_seconds: float = WAIT_SECONDS) -> None:
        self.actor = actor
        self.wait_seconds = wait_seconds

    def decide(self, step: int, reports: Sequence[ShardReport], state: RoundState) -> Decision | None:
        """The decision of the round after `step`, or None.

        Raises:
            ConfigError: what the coordinator refuses; an error in the reports is not a round without decision.
        """
        try:
            answer: Decision = ray.get(self.actor.decide.remote(step, reports, state), timeout=self.wait_seconds)
        except RayTaskError:
            raise
        except RayError as error:  # the actor is dead, restarting or out of reach, or the answer takes too long
            _log.warning("step %d: no decision from the coordinator, the round is skipped: %s", step, error or type(error).__name__)
            return None
        return answer
