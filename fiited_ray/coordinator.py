"""The coordinator: an actor that hears every shard's report and tells all of them one decision. A thin shell over `policy`."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from fiited_ray.config import PolicyConfig
from fiited_ray.policy import Decision, RoundState, ShardReport, decide

WAIT_SECONDS = 60.0  # for the slowest shard's report; then the round is skipped
_REMEMBERED = 4  # rounds whose decision a late or repeated report can still get
_TELEMETRY = 1000


class Decider(Protocol):
    """Where a worker takes its reports. None: no decision could be had, the round is skipped."""

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None: ...


class LocalDecider:
    """Decides for the only shard there is, in its own process."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.policy = policy

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None:
        return decide([report], state, self.policy)


class _Round:
    def __init__(self) -> None:
        self.reports: dict[int, ShardReport] = {}
        self.done = asyncio.Event()
        self.decision: Decision | None = None


class Coordinator:
    """The actor's body. Rounds are numbered by the workers; a round ends when all have reported or the wait is over.

    It keeps nothing that the next round needs: after a crash Ray restarts it and the next round proceeds.
    """

    def __init__(self, policy: PolicyConfig, workers: int, wait_seconds: float = WAIT_SECONDS) -> None:
        self._policy = policy
        self._workers = workers
        self._wait = wait_seconds
        self._rounds: OrderedDict[int, _Round] = OrderedDict()
        self._telemetry: list[dict[str, float]] = []
        self._progress = ""

    async def decide(self, number: int, rank: int, report: ShardReport, state: RoundState) -> Decision | None:
        """Report for shard `rank` of round `number`; returns when the round is decided, or None after the wait.

        Raises:
            ValueError: for a rank that cannot be.
        """
        if not 0 <= rank < self._workers:
            raise ValueError(f"round {number}: rank {rank} reported, but there are {self._workers} workers")
        current = self._rounds.setdefault(number, _Round())
        while len(self._rounds) > _REMEMBERED:
            self._rounds.popitem(last=False)
        current.reports[rank] = report
        if len(current.reports) == self._workers and not current.done.is_set():
            start = time.perf_counter()
            current.decision = decide([current.reports[each] for each in range(self._workers)], state, self._policy)
            self._note(number, current.decision, time.perf_counter() - start)
            current.reports.clear()
            current.done.set()
        try:
            await asyncio.wait_for(current.done.wait(), self._wait)
        except TimeoutError:
            return None
        return current.decision

    async def tell(self, progress: str) -> None:
        """Note a line for the person who watches the run."""
        self._progress = progress

    async def progress(self) -> str:
        return self._progress

    async def telemetry(self) -> list[dict[str, float]]:
        """The last decisions: round, threshold, planned and changed bytes, skipped, seconds."""
        return self._telemetry

    def _note(self, number: int, decision: Decision, seconds: float) -> None:
        self._telemetry.append(
            {
                "round": number,
                "threshold": decision.threshold,
                "planned_bytes": decision.planned_bytes,
                "changed_bytes": decision.changed_bytes,
                "skipped": float(decision.skipped),
                "seconds": seconds,
            }
        )
        del self._telemetry[:-_TELEMETRY]


def start_coordinator(policy: PolicyConfig, workers: int, wait_seconds: float = WAIT_SECONDS) -> Any:
    """Start the actor; Ray restarts it whenever it dies."""
    actor = ray.remote(Coordinator).options(max_restarts=-1, max_task_retries=0, num_cpus=0, max_concurrency=max(1000, 2 * workers))
    return actor.remote(policy, workers, wait_seconds)


class RemoteDecider:
    """A worker's line to the coordinator. It never hangs: what goes wrong there, or lasts too long, is a round without decision."""

    def __init__(self, actor: Any, rank: int, wait_seconds: float = WAIT_SECONDS) -> None:
        self.actor = actor
        self.rank = rank
        self.wait_seconds = wait_seconds

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None:
        try:
            answer: Decision | None = ray.get(self.actor.decide.remote(number, self.rank, report, state), timeout=self.wait_seconds * 1.5)
        except RayTaskError:
            raise
        except (RayActorError, GetTimeoutError):
            return None
        return answer
