"""The run in MLflow: the driver makes it and ends it; in between rank 0 alone writes to it (`run_writer`).

Every call names its store: there is no global MLflow state. Metric names are stable (see docs/how-it-works.md, "What a run logs").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from fiited_ray.config import Config, ConfigError
from fiited_ray.credentials import redact, scrub
from fiited_ray.tracking_address import SQLITE, absolute_uri, check_address

_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 6000
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI then shows pages for training, not for language models


@dataclass(frozen=True)
class RunRef:
    """A run and where it is written; passed to the worker that writes it."""

    uri: str = field(repr=False)  # with its password, if it has one
    experiment_id: str
    run_id: str

    @property
    def ui_command(self) -> str:
        """The command that opens the UI on this store; empty where a server is already there."""
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {self.uri}" if self.uri.startswith("sqlite:") else ""

    @property
    def page(self) -> str:
        """Address of this run's page in the UI, in its view for training (its other one is for language models)."""
        server = "http://127.0.0.1:5000" if self.uri.startswith("sqlite:") else redact(self.uri).rstrip("/")
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"


def create_run(config: Config, tags: Mapping[str, str]) -> RunRef:
    """Make a run with its parameters, tags and resolved configuration.

    Raises:
        ConfigError: when the tracking store cannot be reached.
    """
    uri = absolute_uri(config.tracking.uri)
    check_address(uri)
    with redacting(uri, ConfigError):
        client = MlflowClient(uri)
        experiment = _experiment(client, uri, config.tracking.experiment)
        tags = {**resolve_tags(), "fiited_ray.version": _version(), **tags}  # resolve_tags: user, program and commit, as MLflow shows them
        run = client.create_run(experiment, run_name=config.name, tags=tags)
        ref = RunRef(uri, experiment, run.info.run_id)
        flat = config.flat() | {"tracking.uri": redact(uri)}
        params = [Param(metric_safe(name), value[:_LONGEST_PARAM]) for name, value in flat.items()]
        for begin in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(ref.run_id, params=params[begin : begin + _PARAMS_AT_ONCE])
        client.log_text(ref.run_id, config.to_yaml(), "config.yaml")
    return ref


def open_run(config: Config, tags: Mapping[str, str], run_id: str | None) -> RunRef:
    """Go on writing to a run that an earlier job began; make a new one where there is none, or not in this store.

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
                return create_run(config, tags)
            client.update_run(run_id, status="RUNNING")
        return RunRef(uri, str(run.info.experiment_id), run_id)
    return create_run(config, tags)


def describe(ref: RunRef, text: str) -> None:
    """Show a text, in Markdown, as the run's description on its page."""
    with redacting(ref.uri):
        MlflowClient(ref.uri).set_tag(ref.run_id, MLFLOW_RUN_NOTE, text)


def finish(ref: RunRef, status: str) -> None:
    """End a run: FINISHED, FAILED or KILLED."""
    with redacting(ref.uri):
        MlflowClient(ref.uri).set_terminated(ref.run_id, status)


@contextmanager
def redacting(uri: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Turn MLflow's errors into ours: its own spell out the address, password and all, and so would their causes (hence from None)."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, ValueError) as raised:
        text = scrub(str(raised), uri) or f"{type(raised).__name__}; its words would tell the password and are left out"
        raise error(f"tracking.uri {redact(uri)}: {text}") from None


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


def _version() -> str:
    try:
        return version("fiited-ray")
    except PackageNotFoundError:
        return "source"
