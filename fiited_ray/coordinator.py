"""The coordinator: an actor that hears every shard's report and tells all of them one decision. A thin shell over `policy`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

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


class GroupDecider:
    """Decides in every worker alike, without an actor: all of the process group gather all reports. For benchmarks and tests."""

    def __init__(self, policy: PolicyConfig) -> None:
        self.policy = policy

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None:
        import torch.distributed as dist  # the actor does without torch

        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        return decide(reports, state, self.policy)


class _Round:
    """One round's reports until it is closed: with a decision, with an error, or with neither once the wait is over."""

    def __init__(self) -> None:
        self.reports: dict[int, ShardReport] = {}
        self.state: RoundState | None = None
        self.closed = asyncio.Event()
        self.decision: Decision | None = None
        self.error: Exception | None = None

    def close(self) -> None:
        self.reports.clear()
        self.closed.set()

    def outcome(self) -> Decision | None:
        if self.error is not None:
            raise type(self.error)(*self.error.args)  # anew: one exception raised by all waiters would gather all their tracebacks
        return self.decision


class Coordinator:
    """The actor's body. Rounds are numbered by the workers; a round ends when all have reported or the wait is over.

    It keeps nothing that the next round needs: after a crash Ray restarts it and the next round proceeds.
    """

    def __init__(self, policy: PolicyConfig, workers: int, wait_seconds: float = WAIT_SECONDS) -> None:
        self._policy = policy
        self._workers = workers
        self._wait = wait_seconds
        self._attempt = 0
        self._rounds: dict[int, _Round] = {}
        self._stop = ""
        self._telemetry: list[dict[str, float]] = []
        self._progress = ""

    async def decide(
        self, number: int, rank: int, report: ShardReport, state: RoundState, attempt: int = 0, workers: int | None = None
    ) -> Decision | None:
        """Report for shard `rank` of round `number`; returns when the round is decided, or None once its wait is over.

        All shards of a round get the same answer, those too late for it included; None when it is no longer remembered, or belongs to
        an attempt that is over.

        Args:
            attempt: rises each time workers are started anew; what earlier ones reported is then forgotten.
            workers: how many there are in this attempt; None: as many as when the actor was made.

        Raises:
            ValueError: on every shard of the round, for a rank that cannot be, a rank that says two things, or shards that differ in
                what should be the same for all.
            ConfigError: on every shard of the round, for a budget or ceiling that does not hold the least.
        """
        if attempt > self._attempt:
            for each in self._rounds.values():
                each.close()
            self._rounds, self._attempt, self._workers = {}, attempt, workers or self._workers
        current = self._round(number) if attempt == self._attempt else None
        if current is None:
            return None
        if not current.closed.is_set():
            try:
                self._take(current, number, rank, report, state)
            except ValueError as error:  # a ConfigError is one, too
                current.error = error
                current.close()
        try:
            await asyncio.wait_for(current.closed.wait(), self._wait)
        except TimeoutError:
            current.close()
        return current.outcome()

    def _round(self, number: int) -> _Round | None:
        """The round, made when its first report comes; None when it is older than all that are remembered."""
        if number not in self._rounds:
            if len(self._rounds) == _REMEMBERED and number < min(self._rounds):
                return None
            self._rounds[number] = _Round()
        while len(self._rounds) > _REMEMBERED:
            self._rounds.pop(min(self._rounds)).close()
        return self._rounds[number]

    def _take(self, current: _Round, number: int, rank: int, report: ShardReport, state: RoundState) -> None:
        if not 0 <= rank < self._workers:
            raise ValueError(f"round {number}: rank {rank} reported, but there are {self._workers} workers")
        if current.state is not None and current.state != state:
            raise ValueError(f"round {number}: rank {rank} has {state}, but ranks {sorted(current.reports)} have {current.state}")
        if rank in current.reports and not current.reports[rank].same_as(report):
            raise ValueError(f"round {number}: rank {rank} reported twice, and not the same; each worker needs a rank of its own")
        current.state = state
        current.reports[rank] = report
        if len(current.reports) < self._workers:
            return
        start = time.perf_counter()
        reports = [current.reports[each] for each in range(self._workers)]
        current.decision = decide(reports, state, self._policy)
        self._note(number, current.decision, sum(int(each.histogram[0].sum()) for each in reports), time.perf_counter() - start)
        current.close()

    async def tell(self, progress: str) -> None:
        """Note a line for the person who watches the run."""
        self._progress = progress

    async def progress(self) -> str:
        return self._progress

    async def stop(self, why: str) -> None:
        """Ask the workers to save and end."""
        self._stop = why

    async def stopping(self) -> str:
        """Why the workers are to end; empty while they are not."""
        return self._stop

    async def telemetry(self) -> list[dict[str, float]]:
        """The last 1000 decisions: round, threshold, planned and changed bytes, skipped, rows, seconds."""
        return self._telemetry

    def _note(self, number: int, decision: Decision, rows: int, seconds: float) -> None:
        self._telemetry.append(
            {
                "round": number,
                "threshold": decision.threshold,
                "planned_bytes": decision.planned_bytes,
                "changed_bytes": decision.changed_bytes,
                "skipped": float(decision.skipped),
                "rows": rows,
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

    def __init__(self, actor: Any, rank: int, wait_seconds: float = WAIT_SECONDS, attempt: int = 0, workers: int | None = None) -> None:
        self.actor = actor
        self.rank = rank
        self.wait_seconds = wait_seconds
        self.attempt, self.workers = attempt, workers

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None:
        """The decision of round `number`, or None.

        Raises:
            ValueError: what the coordinator refuses; an error in the reports is not a round without decision.
        """
        try:
            answer: Decision | None = ray.get(
                self.actor.decide.remote(number, self.rank, report, state, self.attempt, self.workers), timeout=self.wait_seconds * 1.5
            )
        except RayTaskError:
            raise
        except RayError:  # the actor is dead, restarting or out of reach, or the answer takes too long
            return None
        return answer
