"""The run in MLflow: the driver makes it and ends it; in between rank 0 alone writes to it (`run_writer`).

Every call names its store: there is no global MLflow state. Metric names are stable (see docs/how-it-works.md, "What a run logs").
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from fiited_ray.config import Config, ConfigError
from fiited_ray.credentials import redact, scrub
from fiited_ray.tracking_address import SQLITE, RunRef, absolute_uri, check_address

METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 6000
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI then shows pages for training, not for language models


def create_run(
    config: Config,
    tags: Mapping[str, str],
    inputs: Sequence[DatasetInput] = (),
    name: str | None = None,
    params: Mapping[str, str] | None = None,
) -> RunRef:
    """Make a run with its parameters, tags, data sets and resolved configuration.

    Args:
        name: what the run is called, where that is not the configuration's name.
        params: instead of the configuration's keys.

    Raises:
        ConfigError: when the tracking store cannot be reached.
    """
    uri = absolute_uri(config.tracking.uri)
    check_address(uri)
    with redacting(uri, ConfigError):
        client = MlflowClient(uri)
        experiment = _experiment(client, uri, config.tracking.experiment)
        run = client.create_run(experiment, run_name=name or config.name, tags=_all_tags(tags))
        ref = RunRef(uri, experiment, run.info.run_id)
        if params is None:  # without the name, which is the run's own: the UI would compare runs by it
            flat = config.flat() | {"tracking.uri": redact(uri)}
            params = {key: value for key, value in flat.items() if key != "name"}
        entries = [Param(metric_safe(name), value[:_LONGEST_PARAM]) for name, value in params.items()]
        for begin in range(0, len(entries), _PARAMS_AT_ONCE):
            client.log_batch(ref.run_id, params=entries[begin : begin + _PARAMS_AT_ONCE])
        client.log_text(ref.run_id, config.to_yaml(), "config.yaml")
        if inputs:
            client.log_inputs(ref.run_id, list(inputs))
    return ref


def open_run(
    config: Config, tags: Mapping[str, str], run_id: str | None, inputs: Sequence[DatasetInput] = (), name: str | None = None
) -> RunRef:
    """Go on writing to a run that an earlier job began; make a new one where there is none, or not in this store.

    Tags, data sets and `config.yaml` become those of now; parameters stay as they were first logged, for MLflow changes none.

    Raises:
        ConfigError: when the tracking store cannot be reached.
    """
    uri = absolute_uri(config.tracking.uri)
    if run_id is not None:
        check_address(uri)
        with redacting(uri, ConfigError):
            client = MlflowClient(uri)
            try:
                run = client.get_run(run_id)
            except MlflowException:
                return create_run(config, tags, inputs, name)
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _all_tags(tags).items()])
            client.log_text(run_id, config.to_yaml(), "config.yaml")
            if inputs:
                client.log_inputs(run_id, list(inputs))  # those that it has are not added again
        return RunRef(uri, str(run.info.experiment_id), run_id)
    return create_run(config, tags, inputs, name)


def describe(ref: RunRef, text: str) -> None:
    """Show a text, in Markdown, as the run's description on its page."""
    with redacting(ref.uri):
        MlflowClient(ref.uri).set_tag(ref.run_id, MLFLOW_RUN_NOTE, text)


def replace_metrics(ref: RunRef, step: int, values: Mapping[str, float]) -> None:
    """Make these a run's metrics, at this step or the one after all it has: MLflow shows a metric's value of the highest step.

    It deletes no metric: one that is not among these becomes NaN.
    """
    with redacting(ref.uri):
        client = MlflowClient(ref.uri)
        before = client.get_run(ref.run_id).data.metrics
        steps = [each.step for name in before for each in client.get_metric_history(ref.run_id, name)]
        step, now = max([step, *(1 + each for each in steps)]), int(time.time() * 1000)
        new = {metric_safe(name): value for name, value in values.items() if not math.isnan(value)}
        metrics = [Metric(name, value, now, step) for name, value in (dict.fromkeys(before, math.nan) | new).items()]
        for begin in range(0, len(metrics), METRICS_AT_ONCE):
            client.log_batch(ref.run_id, metrics=metrics[begin : begin + METRICS_AT_ONCE])


def finish(ref: RunRef, status: str) -> None:
    """End a run: FINISHED, FAILED or KILLED."""
    with redacting(ref.uri):
        MlflowClient(ref.uri).set_terminated(ref.run_id, status)


def is_open(config: Config, run_id: str) -> bool:
    """Whether a run is in the configuration's store and was not brought to its end there.

    Raises:
        ConfigError: when the tracking store cannot be reached.
    """
    uri = absolute_uri(config.tracking.uri)
    check_address(uri)
    with redacting(uri, ConfigError):
        try:
            run = MlflowClient(uri).get_run(run_id)
        except MlflowException:
            return False
    return bool(run.info.status != "FINISHED")


def resume(ref: RunRef) -> bool:
    """Mark a run as running again; False where there is no such run any more."""
    with redacting(ref.uri, ConfigError):
        client = MlflowClient(ref.uri)
        try:
            run = client.get_run(ref.run_id)
        except MlflowException:
            return False
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return False
        client.update_run(ref.run_id, "RUNNING")
    return True


def end_children(parent: RunRef, status: str, tags: Mapping[str, str] | None = None) -> None:
    """End those runs below another, with these tags, that nothing has ended."""
    wanted = {MLFLOW_PARENT_RUN_ID: parent.run_id, **(tags or {})}
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    with redacting(parent.uri):
        client = MlflowClient(parent.uri)
        for run in client.search_runs([parent.experiment_id], f"{condition} and attributes.status = 'RUNNING'"):
            client.set_terminated(run.info.run_id, status)


def has_model(ref: RunRef) -> bool:
    """Whether a model has been logged as this run's."""
    with redacting(ref.uri):
        outputs = MlflowClient(ref.uri).get_run(ref.run_id).outputs
    return bool(outputs and outputs.model_outputs)


def upload(ref: RunRef, files: Sequence[Path]) -> None:
    """Put files among a run's artifacts, under their own names."""
    with redacting(ref.uri):
        client = MlflowClient(ref.uri)
        for file in files:
            client.log_artifact(ref.run_id, str(file))


@contextmanager
def redacting(uri: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Turn MLflow's errors into ours: its own spell out the address, password and all, and so would their causes (hence from None)."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, ValueError) as raised:
        text = scrub(str(raised), uri) or f"{type(raised).__name__}; its words would tell the password and are left out"
        raise error(f"tracking.uri {redact(uri)}: {text}") from None


def _all_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """With user, program and commit, as MLflow shows them."""
    return {**resolve_tags(), "fiited_ray.version": package_version("fiited-ray"), **tags}


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith(SQLITE):  # artifacts lie beside the database, wherever the UI is started from
        location = (Path(uri[len(SQLITE) :]).parent / "mlartifacts" / re.sub(r"[^A-Za-z0-9._-]", "_", name)).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=_KIND))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another run was faster
        if found is None:
            raise
        return str(found.experiment_id)


def metric_safe(name: str) -> str:
    """MLflow takes letters, digits, and _-./ and spaces."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def package_version(package: str) -> str:
    """The installed version; `source` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"
