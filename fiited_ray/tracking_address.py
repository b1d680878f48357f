"""Where runs are tracked: the address made absolute, and checked before MLflow or anything else starts."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

from fiited_ray.config import ConfigError
from fiited_ray.credentials import redact

SQLITE = "sqlite:///"


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
