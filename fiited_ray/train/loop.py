"""The worker's loop, top to bottom: route -> vectors -> logits -> loss -> backward (which updates the store) -> now and then a round.

Runs the same in a Ray Train worker and in a plain process; what differs comes in as arguments.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from fiited_ray.ahead import ahead
from fiited_ray.config import Config
from fiited_ray.coordinator import Decider
from fiited_ray.data.batch import Batch
from fiited_ray.embedding import PhaseTimes, Route, annotated
from fiited_ray.exchange import Exchange
from fiited_ray.fixed_rows import make_embedding
from fiited_ray.methods import shares_rows
from fiited_ray.models import build_model
from fiited_ray.policy import RoundSchedule
from fiited_ray.store import ShardSpec, VhpiShard
from fiited_ray.train.guards import SkippedSteps, check_store, learn_dense, usable
from fiited_ray.train.joined import joined
from fiited_ray.train.metrics import BinaryMetrics
from fiited_ray.train.report import History, StoreTotals
from fiited_ray.train.rounds import hold_round

Batches = Callable[[], Iterable[Batch]]  # opens the data, from the worker's position on where it is training data
Item = TypeVar("Item")
_logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Where rank 0 sends its metrics."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...


class Stopped(Exception):  # noqa: N818 (not an error)
    """Training ends here because somebody asked for it; it can go on from this step."""


class Saver(Protocol):
    """What takes checkpoints."""

    def after_step(self) -> Mapping[str, float] | None: ...


@dataclass(frozen=True)
class Position:
    """Where training stands in its data."""

    epoch: int = 0
    batch: int = 0  # global batches of the epoch that have been learned from


@dataclass
class Worker:
    """One worker's model, store and place among the others."""

    config: Config
    budget_bytes: int | None
    exchange: Exchange
    decider: Decider
    writer: Writer | None = None  # of rank 0
    tell: Callable[[str], None] = lambda text: None  # progress, for a person
    scored: Callable[[dict[str, float]], None] = lambda values: None  # called on every worker, with the same values, at `eval_every`
    beat: Callable[[], None] = lambda: None  # called after each batch: the worker goes on
    history: History = field(default_factory=History)
    distinct_ids: int | None = None  # of the training data; only methods whose rows are shared by ids need it, for their metrics

    def __post_init__(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.spec = ShardSpec.of(config, self.budget_bytes, self.exchange.rank, self.exchange.workers)
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.train.use_gpu else torch.device("cpu")
        self.shard = VhpiShard(self.spec, self.device)
        self.times = PhaseTimes()
        self.times_ahead = PhaseTimes()  # of the thread that routes the next batch
        self.exchange_ahead = self.exchange.another() if config.train.overlap else self.exchange
        self.embedding = make_embedding(
            config,
            self.shard,
            self.exchange,
            lr=config.embedding.lr,
            mean=config.embedding.pooling == "mean",
            budget_bytes=self.budget_bytes,
            ceiling_bytes=config.policy.max_shard_bytes,
            times=self.times,
            skip_not_finite=config.train.not_finite == "skip",
        )
        self.dense = build_model(config.model, len(config.data.dense), len(config.data.features), config.embedding.dim)
        self.dense.to(self.device)
        self.parameters, self.gradient = joined(self.dense)
        self.optimizer = dense_optimizer(config, [self.parameters])
        self.schedule = RoundSchedule(config.policy)
        self.threshold = 0.0  # the global one, in force since the last round
        self.losses: array[float] = array("d")  # of the global batches
        self.skipped_rows = 0  # bad ones, of this worker's
        self.skipped = SkippedSteps()
        self.window = BinaryMetrics()  # of training batches since the last report, each scored before it was learned from
        self.progressive = BinaryMetrics()  # of all training batches
        self.window_start = (time.perf_counter(), 0, 0)  # clock, samples, bytes sent
        self.samples = 0
        self.training_seconds = 0.0  # evaluation apart
        self.last_totals: StoreTotals | None = None  # at this process's last report
        self.last_lookups = (0, 0)  # and hits, at the last report
        self.position = Position()

    @property
    def step(self) -> int:
        return self.embedding.step

    @property
    def bytes_sent(self) -> int:
        """By the embedding to other workers; what has been sent ahead is in it."""
        ahead_ = self.exchange_ahead.bytes_sent if self.exchange_ahead is not self.exchange else 0
        return self.exchange.bytes_sent + ahead_

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Neither the time that passes meanwhile, by phase or in all, nor what is sent counts as training's."""
        seconds, clock, sent = dict(self.times.seconds), time.perf_counter(), self.exchange.bytes_sent
        yield
        self.times.seconds = seconds
        start, samples, sent_before = self.window_start
        self.window_start = (start + time.perf_counter() - clock, samples, sent_before + self.exchange.bytes_sent - sent)

    def log(self, values: Mapping[str, float]) -> None:
        """Send metrics of this step on, where this worker is the one that does."""
        if self.writer is not None:
            self.writer.metrics(self.step, values)


def train(worker: Worker, batches: Batches, test: Batches | None = None, saver: Saver | None = None) -> dict[str, float]:
    """Train for the configured epochs or steps, from the worker's position on; returns the final metrics, the same on every worker."""
    config = worker.config
    for epoch in range(worker.position.epoch, config.train.epochs):
        clock = time.perf_counter()
        with closing(_routed(worker, batches())) as routed:
            for batch, route in routed:
                train_step(worker, batch, route)
                if worker.schedule.due(worker.step, worker.embedding.crowded):
                    with worker.times.phase("round"):
                        hold_round(worker)
                if config.train.debug:
                    check_store(worker)
                if worker.step % config.tracking.log_every == 0:
                    report(worker)
                worker.training_seconds += time.perf_counter() - clock
                if config.train.eval_every and worker.step % config.train.eval_every == 0:
                    scores = _scores(worker, test)
                    worker.log(scores)
                    worker.scored(worker.history.last | scores)
                clock = time.perf_counter()
                worker.position = Position(epoch, worker.position.batch + 1)
                if saver and (values := saver.after_step()) is not None:
                    worker.log(values)
                worker.beat()
                if worker.embedding.stop_agreed:
                    raise Stopped(f"stopped after step {worker.step:,}")
        if config.train.max_steps is not None and worker.step >= config.train.max_steps:
            break
        worker.position = Position(epoch + 1)
    if worker.history.reported < len(worker.losses):
        report(worker)
    results = _scores(worker, test)
    results["bytes/peak_of_run"] = max(worker.history.values["bytes/peak"])
    results |= {f"time_of_run/{phase}": seconds for phase, seconds in worker.history.seconds.items()}
    results["run/workers"] = float(worker.exchange.workers)
    results["speed/samples_per_s_of_run"] = worker.samples / worker.training_seconds
    worker.log(results)
    return worker.history.last | results


def train_step(worker: Worker, batch: Batch, route: Route | None = None) -> None:
    """Forward, backward and both updates on this worker's slice of a global batch; `route` is the batch's, where it has been made ahead.

    The loss is the mean over the global batch, so slices may differ in size or be empty: each worker's is its share of that mean, and
    gradients are added over workers.
    """
    if not worker.embedding.training or not worker.dense.training:
        worker.dense.train()
        worker.embedding.train()
    if route is None:
        with worker.times.phase("route"):
            route = worker.embedding.route(batch)
    vectors_BFD = worker.embedding(batch, route)
    with worker.times.phase("model"):
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=worker.config.model.precision == "bfloat16"):
            logits_B = worker.dense(batch.dense, vectors_BFD).float()
        scores_B = logits_B.detach()
        # The one number of a step that the host waits for.
        loss_sum = float(nn.functional.binary_cross_entropy_with_logits(scores_B, batch.labels, reduction="sum"))
    worker.skipped_rows += batch.skipped
    if not usable(worker, scores_B, loss_sum):
        return
    inner = sum(worker.times.seconds.get(phase, 0.0) for phase in ("route", "update"))
    start = time.perf_counter()
    with annotated("backward"):
        worker.gradient.zero_()
        logits_B.backward((torch.sigmoid(scores_B) - batch.labels) / max(1, route.rows))  # of the mean loss
    with worker.times.phase("model"):
        learn_dense(worker)
    spent_inside = sum(worker.times.seconds.get(phase, 0.0) for phase in ("route", "update")) - inner
    worker.times.seconds["model"] += time.perf_counter() - start - spent_inside
    worker.window.update(scores_B, batch.labels)
    if worker.config.train.progressive:
        worker.progressive.update(scores_B, batch.labels)
    worker.losses.append(loss_sum / route.rows if route.rows else math.nan)
    worker.samples += route.rows


def evaluate(worker: Worker, batches: Iterable[Batch]) -> dict[str, float]:
    """Score batches without learning; metrics over all workers, and with `data.bad_rows=skip` how many rows were left out."""
    worker.dense.eval()
    worker.embedding.eval()
    metrics, skipped_rows = BinaryMetrics(), 0
    with torch.no_grad():
        for batch in batches:
            batch.validate(worker.config.data.features, worker.config.data.dense)
            batch = batch.to(worker.device)
            metrics.update(worker.dense(batch.dense, worker.embedding(batch)), batch.labels)
            skipped_rows += batch.skipped
            worker.beat()
    values = _shared(worker, metrics)
    if worker.config.data.bad_rows == "skip":
        values["skipped_rows"] = float(worker.exchange.all_reduce(torch.tensor([skipped_rows]))[0])
    return values


def _scores(worker: Worker, test: Batches | None) -> dict[str, float]:
    """What is known of the quality now: of all training batches so far, where they are scored, and of the test set, where there is one."""
    scores = (
        {f"progressive/{name}": value for name, value in _shared(worker, worker.progressive).items()}
        if worker.config.train.progressive
        else {}
    )
    if test:
        with worker.not_training():
            scores |= {f"eval/{name}": value for name, value in evaluate(worker, test()).items()}
    return scores


def report(worker: Worker) -> dict[str, float]:
    """Share and log what the last steps did; returns it, the same on every worker."""
    now, sent = time.perf_counter(), worker.bytes_sent
    clock, samples, bytes_before = worker.window_start
    steps = max(1, len(worker.losses) - worker.history.reported)
    counted = worker.distinct_ids if shares_rows(worker.config) else None
    totals = StoreTotals.gather(worker.shard, worker.embedding.take_peak(), worker.exchange, counted)
    values = {f"train/{name}": value for name, value in _shared(worker, worker.window).items() if name != "rows"}
    losses = worker.exchange.all_reduce(torch.tensor(worker.losses[worker.history.reported :], dtype=torch.float64))
    values["train/loss"] = float(losses.nanmean()) if len(losses) else float("nan")
    values |= _skipped(worker)
    values |= totals.metrics(worker.config, worker.budget_bytes, worker.last_lookups)
    values["wire/bytes_per_step"] = float(worker.exchange.all_reduce(torch.tensor([(sent - bytes_before) / steps]))[0])
    phases = worker.times.take()
    worker.history.add_seconds(phases)
    values |= {f"time/{phase}": seconds / steps for phase, seconds in phases.items()}
    values |= {f"ahead/{phase}": seconds / steps for phase, seconds in worker.times_ahead.take().items()}
    values["speed/samples_per_s"] = (worker.samples - samples) / max(1e-9, now - clock)
    worker.history.reported = len(worker.losses)
    worker.history.add(worker.step, values, totals.rows_by_width)
    worker.last_totals, worker.last_lookups = totals, (totals.lookups, totals.hits)
    worker.window_start = (now, worker.samples, sent)
    worker.window.reset()
    worker.log(values)
    _tell(
        worker,
        f"step {worker.step}: loss {values['train/loss']:.4f}, AUC {values['train/auc']:.4f}, "
        f"{values['bytes/total'] / 2**20:.1f} MiB, hits {values['lookup/hit_rate']:.1%}, {values['speed/samples_per_s']:,.0f} samples/s",
    )
    return values


def _skipped(worker: Worker) -> dict[str, float]:
    """What has been left out since the start; nothing where the configuration leaves nothing out."""
    config = worker.config
    if config.data.bad_rows == "error" and config.train.not_finite == "error":
        return {}
    rows, bags = worker.exchange.all_reduce(torch.tensor([worker.skipped_rows, worker.embedding.skipped_bags])).tolist()
    return {"data/skipped_rows": rows, "train/skipped_bags": bags, "train/skipped_steps": float(worker.skipped.steps)}


def _tell(worker: Worker, text: str) -> None:
    _logger.info(text)
    worker.tell(text)


def _routed(worker: Worker, batches: Iterable[Batch]) -> Generator[tuple[Batch, Route], None, None]:
    """Training batches, checked, with their routes; with `train.overlap` they are made in a thread, ahead of their step.

    A route does not touch the store, so that it is the same whenever it is made.
    """
    most = worker.config.train.max_steps
    batches = islice(batches, None if most is None else max(0, most - worker.step))  # a route is a collective: all workers make as many
    if not worker.config.train.overlap:
        yield from _route_each(worker, batches, worker.times)
        return
    with closing(ahead(_route_each(worker, batches, worker.times_ahead), 1, "routes")) as routed:
        yield from _timed(routed, worker.times, "wait")


def _route_each(worker: Worker, batches: Iterable[Batch], times: PhaseTimes) -> Iterator[tuple[Batch, Route]]:
    for batch in _timed(batches, times, "data"):
        with times.phase("route"):
            batch.validate(worker.config.data.features, worker.config.data.dense)
            # Made ahead, a route is the CPU's work, beside the device's and without its collectives, which two threads must not mix.
            if not worker.config.train.overlap:
                batch = batch.to(worker.device)
            route = worker.embedding.route(batch, worker.exchange_ahead)
        yield batch.to(worker.device), route.to(worker.device)


def _timed(items: Iterable[Item], times: PhaseTimes, phase: str) -> Iterator[Item]:
    iterator = iter(items)
    while True:
        with times.phase(phase):
            item = next(iterator, None)
        if item is None:
            return
        yield item


def dense_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the dense parameters that a configuration names."""
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
    return cast(torch.optim.Optimizer, kinds[config.train.optimizer](parameters, lr=config.train.lr, fused=True))


def _shared(worker: Worker, metrics: BinaryMetrics) -> dict[str, float]:
    return BinaryMetrics.from_state(worker.exchange.all_reduce(metrics.state()))
