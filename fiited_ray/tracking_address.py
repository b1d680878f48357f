"""Where runs are tracked: the address made absolute, and checked before MLflow or anything else starts. MLflow is not imported here."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fiited_ray.config import ConfigError
from fiited_ray.credentials import redact

SQLITE = "sqlite:///"


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


def absolute_uri(uri: str) -> str:
    """A relative SQLite path becomes absolute, so that workers in other folders write the same file."""
    if uri.startswith(SQLITE):
        path = Path(uri[len(SQLITE) :])
        return f"{SQLITE}{path if path.is_absolute() else Path.cwd() / path}"
    return uri


def check_address(uri: str) -> None:
    """Check what can be told without a connection to a server.

    Raises:
        ConfigError: for an SQLite file that cannot be written, or a password with characters that end the address.
    """
    _check_database(uri)
    _check_escapes(uri)


def _check_database(uri: str) -> None:
    """Open an SQLite file once: MLflow itself tries for minutes where that cannot work."""
    if not uri.startswith(SQLITE):
        return
    path = Path(uri[len(SQLITE) :])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path)
        try:
            connection.execute("PRAGMA schema_version")
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"tracking.uri {uri}: {error}; name a file that can be written") from error


def _check_escapes(uri: str) -> None:
    """A # ? or / in a password ends the host's part of an http address early: MLflow would call another host, or say so in riddles."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # its message may repeat the password
        raise ConfigError(f"tracking.uri {redact(uri)}: not an address; write it as https://HOST:PORT") from None
    place = uri.rpartition("@")[2].partition("/")[0]
    if parts.scheme in ("http", "https") and "@" in uri and not parts.netloc.endswith(place):
        raise ConfigError(
            f"tracking.uri {redact(uri)}: what stands before the @ holds a #, ? or /; write them as %23, %3F and %2F, "
            "or give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
