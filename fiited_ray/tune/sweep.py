"""The sweep's driver: asks Ray Tune for trials, keeps their records, and hangs them below one run in MLflow."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.tune

from fiited_ray import tracking
from fiited_ray.config import Config, ConfigError
from fiited_ray.fitting import settle
from fiited_ray.tracked_data import data_digest, inputs_of
from fiited_ray.tracked_model import log_model
from fiited_ray.tracking_address import RunRef, absolute_uri
from fiited_ray.train.plan import Plan, count_ids, make_plan
from fiited_ray.train.trainer import connect
from fiited_ray.tune import pareto, space
from fiited_ray.tune.answer import Answer, Reference, answer, table
from fiited_ray.tune.bisection import BudgetBisection, ladder
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.progress import Keeper
from fiited_ray.tune.records import Folder, Trial
from fiited_ray.tune.scheduler import AshaByBudget
from fiited_ray.tune.search import QualityAndBytes, covers
from fiited_ray.tune.seeds import SEED, over_seeds, without_seed
from fiited_ray.tune.space import FULL, Choices, Range, Settings, settings_of
from fiited_ray.tune.trial import Setup, parent_tags, run_trial

_TRIAL_BYTES = 2**20  # a trial must ask for something, and CPUs are for its workers
_RUNGS = 4  # of a search: a trial may be stopped at 1/4 and 1/2 of its steps


@dataclass(frozen=True)
class Grid:
    """These trials, whatever their results."""

    trials: tuple[Settings, ...]


@dataclass(frozen=True)
class Target:
    """The smallest budget of a method that is good enough."""

    method: str
    least: float  # the smallest share of the dense-equivalent bytes to consider
    precision: float  # budgets to consider are this factor apart


@dataclass(frozen=True)
class Search:
    """What is best in both quality and bytes, out of a space."""

    methods: tuple[str, ...]
    budgets: Choices | Range
    varied: dict[str, Choices | Range]
    trials: int


@dataclass(frozen=True)
class Question:
    """What is asked of a sweep."""

    base: Config  # what all trials share; its name is the sweep's
    asked: Grid | Target | Search
    measure: Measure
    baseline: float | None = None  # the quality at full width, where it is known: it is then not trained
    parallel: int | None = None  # trials at a time; by the cluster's CPUs if left out


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    answer: Answer
    table: str
    trials: tuple[Trial, ...]
    folder: Path
    run: RunRef


def sweep(question: Question, say: Callable[[str], None] = print) -> Outcome:
    """Train what the question needs and is not known yet; all of it ends up in the sweep's folder and below one run in MLflow.

    A sweep that was interrupted, in whatever way, goes on when it is asked again.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    plan = make_plan(question.base.with_settings(settings_of(FULL, "")))
    question = _scored_often_enough(question, plan)
    base = question.base
    counted = count_ids(base, plan.files)
    folder = Folder.open(base, data_digest(plan))
    bare = Setup(base, data_digest(plan), counted, folder, {})
    for settings in _certain(question):  # a mistake is told now, not by the trial that meets it
        make_plan(bare.config(settings), counted if bare.config(settings).data == base.data else None)
    if isinstance(question.asked, Target):
        feasible(bare, question.asked)
    connect(base.train.most_workers)
    parent = _parent(question, folder, plan)
    setup = Setup(base, bare.data_digest, counted, folder, parent_tags(parent.run_id, base.name))
    keeper = Keeper(setup, parent, question.measure, say)
    try:
        _ask(question, setup, keeper, plan)
    except BaseException:
        tracking.finish(parent, "KILLED")
        tracking.end_children(parent, "KILLED")
        raise
    outcome = _conclude(question, keeper, plan, parent)
    tracking.finish(parent, "FINISHED")
    return outcome


def _scored_often_enough(question: Question, plan: Plan) -> Question:
    """A search stops trials early by their scores on the way."""
    if not isinstance(question.asked, Search) or question.base.train.eval_every is not None:
        return question
    every = max(1, _steps(question.base, plan) // _RUNGS)
    return replace(question, base=question.base.with_settings({"train.eval_every": every}))


def _certain(question: Question) -> list[Settings]:
    """Trials that will be trained whatever comes out of others."""
    baseline = [] if question.baseline is not None or isinstance(question.asked, Search) else [settings_of(FULL, "")]
    if isinstance(question.asked, Grid):
        return list(question.asked.trials)
    return baseline


def feasible(setup: Setup, asked: Target) -> list[Settings]:
    """The budgets to consider that hold the least there is to hold, from the smallest on.

    Raises:
        ConfigError: when none of them does.
    """
    steps: list[Settings] = []
    refused: ConfigError | None = None
    for share in ladder(asked.least, asked.precision):
        settings = settings_of(asked.method, space.percent(share))
        try:
            settle(setup.config(settings), setup.ids_by_table)
        except ConfigError as error:
            refused = error
        else:
            steps.append(settings)
    if not steps and refused is not None:
        raise refused
    return steps


def _ask(question: Question, setup: Setup, keeper: Keeper, plan: Plan) -> None:
    """Run the trials, in two steps where the second needs to know the baseline."""
    asked, measure = question.asked, question.measure
    certain = _certain(question)
    if certain:
        _tune(question, setup, keeper, len(certain), {"settings": ray.tune.grid_search(certain)})
    if isinstance(asked, Target):
        steps = feasible(setup, asked)
        reference = Reference.of(keeper.trials(), measure, question.baseline)
        if reference is None:
            raise RuntimeError(f"full width could not be trained: {keeper.errors()}; name its quality with --baseline to go on without it")
        searcher = BudgetBisection(steps, lambda result: measure.within(result, reference.value), measure.key, measure.mode)
        _tune(question, setup, keeper, len(steps), {}, search_alg=searcher)
    if isinstance(asked, Search):
        known = [t.settings for t in setup.folder.trials() if covers(asked.methods, asked.budgets, asked.varied, t.settings)]
        optuna = QualityAndBytes(asked.methods, asked.budgets, asked.varied, measure, question.base.seed, known)
        most = _steps(question.base, plan)
        asha = AshaByBudget("step", measure.key, measure.mode, max(1, most // _RUNGS), most)
        _tune(question, setup, keeper, asked.trials, {}, search_alg=optuna, scheduler=asha)


def _tune(question: Question, setup: Setup, keeper: Keeper, samples: int, points: dict[str, Any], **how: Any) -> None:
    """One Ray Tune experiment. Trials hold no CPU: their workers do, so that two cores are enough for one trial of two workers."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the keeper tells of trials in its own words
    # no second log of every trial; no tables of its own; Ctrl-C ends the sweep; a result may be an error; its own state is no news
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    trainable = ray.tune.with_resources(ray.tune.with_parameters(run_trial, setup=setup), {"CPU": 0, "memory": _TRIAL_BYTES})
    parallel = question.parallel or parallel_trials(question.base)
    config = ray.tune.TuneConfig(num_samples=1 if points else samples, max_concurrent_trials=parallel, reuse_actors=False, **how)
    place = ray.tune.RunConfig(name="tune", storage_path=str(setup.folder.path), callbacks=[keeper], verbose=0)
    keeper.expect(samples)
    ray.tune.Tuner(trainable, param_space=points, tune_config=config, run_config=place).fit()
    shutil.rmtree(setup.folder.path / "tune", ignore_errors=True)  # the records hold all that is needed


def parallel_trials(config: Config) -> int:
    """How many trials the CPUs hold at a time, at least one. A Ray of this machine alone may count more CPUs than there are."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    if len(ray.nodes()) == 1:
        cpus = min(cpus, os.cpu_count() or 1)
    return max(1, cpus // (config.train.most_workers * config.train.threads))


def _steps(config: Config, plan: Plan) -> int:
    """Training steps of a whole run."""
    steps = -(-plan.files.first_rows(config.data.max_rows) // config.train.batch_size) * config.train.epochs
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def _parent(question: Question, folder: Folder, plan: Plan) -> RunRef:
    """The sweep's run in MLflow: the one it had when it was interrupted or asked something else, or a new one."""
    base = question.base
    known = folder.parent()
    if known:
        ref = RunRef(absolute_uri(base.tracking.uri), known["experiment_id"], known["run_id"])
        if tracking.resume(ref):
            tracking.end_children(ref, "KILLED")  # nothing else writes them: whatever started them is gone
            return ref
    synthetic = str(plan.files.synthetic)
    ref = tracking.create_run(base, {"sweep": base.name, "synthetic_data": synthetic}, inputs_of(plan), base.name, params={})
    folder.remember_parent({"experiment_id": ref.experiment_id, "run_id": ref.run_id})
    return ref


def _conclude(question: Question, keeper: Keeper, plan: Plan, parent: RunRef) -> Outcome:
    """Answer, and leave table, plots and the best configuration in the folder and in MLflow."""
    measure, folder = question.measure, keeper.shared.folder
    trials = over_seeds(keeper.trials())
    reference = Reference.of(trials, measure, question.baseline)
    where = " on synthetic data" if plan.files.synthetic else ""
    found = answer(trials, measure, reference, where)
    text = table(trials, measure, reference, found.best)
    title = f": {question.base.name}{' (synthetic data)' if where else ''}"
    figure = pareto.picture(trials, measure, reference, found.best, title)
    figure.savefig(folder.path / "pareto.png", dpi=120)
    (folder.path / "pareto.html").write_text(pareto.page(trials, measure, reference, found.best, title, found.sentence))
    files = ["pareto.png", "pareto.html"]
    if found.best is not None:
        (folder.path / "best.yaml").write_text(best_config(question.base, found.best).to_yaml())
        files.append("best.yaml")
        _log_best(keeper.shared, found.best, parent)
        # charts of runs that are not unfolded show the sweep as the trial it found
        tracking.replace_metrics(parent, int(found.best.metrics["step"]), found.best.metrics)
    tracking.upload(parent, [folder.path / name for name in files])
    tracking.describe(parent, f"{found.sentence}\n\n{text}")
    return Outcome(found, text, tuple(trials), folder.path, parent)


def best_config(base: Config, best: Trial) -> Config:
    """The configuration that trains the best trial anew, as a run of its own."""
    return base.with_settings({**_settings_alone(best), "name": f"{base.name}-best"})


def _settings_alone(best: Trial) -> Settings:
    """A trial's settings; of several seeds, those with the sweep's own."""
    return best.settings if not isinstance(best.settings.get(SEED), tuple) else without_seed(best.settings)


def _log_best(setup: Setup, best: Trial, parent: RunRef) -> None:
    """Put the best trial's model among MLflow's, unless it is there."""
    ref = RunRef(parent.uri, parent.experiment_id, best.run_id)
    if best.model_folder and not tracking.has_model(ref):
        log_model(ref, make_plan(setup.config(_settings_alone(best)), setup.ids_by_table), best.model_folder, best.metrics)
