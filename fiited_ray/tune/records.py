"""What is known of a sweep's trials: one JSON file each, so that a sweep can be stopped at any moment and asked again.

OUTPUT/NAME/sweep.json           what all trials share, and the MLflow run they hang below
OUTPUT/NAME/trials/DIGEST.json   one finished trial; its digest is that of its configuration and data
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fiited_ray.config import Config, ConfigError
from fiited_ray.tune.space import BUDGET, FULL, METHOD, Settings, budget_label, label

State = Literal["finished", "stopped", "failed"]  # stopped: early, by the scheduler
_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One trial and what came of it."""

    settings: Settings
    state: State
    metrics: dict[str, float] = field(default_factory=dict)  # the last ones
    run_id: str = ""  # in MLflow
    model_folder: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        return label(self.settings)

    @property
    def method(self) -> str:
        return str(self.settings[METHOD])

    @property
    def budget(self) -> str:
        return "-" if self.method == FULL else budget_label(str(self.settings[BUDGET]))


@dataclass(frozen=True)
class Folder:
    """A sweep's folder. One process writes it."""

    path: Path

    @staticmethod
    def open(config: Config, data_digest: str) -> Folder:
        """The folder of the sweep that `config` names, made if it is not there.

        Raises:
            ConfigError: when it holds a sweep of other settings or data: its trials do not compare with these.
        """
        folder = Folder(Path(config.output).resolve() / config.name)
        (folder.path / "trials").mkdir(parents=True, exist_ok=True)
        common = _digest(config.with_settings({METHOD: FULL, BUDGET: "none"}), data_digest)
        known = folder._state()
        if known.get("common", common) != common:
            raise ConfigError(
                f"{folder.path}: holds a sweep of other settings or data, which does not compare with this one; choose another name=..."
            )
        folder._write(folder._state_path, known | {"version": _VERSION, "common": common})
        return folder

    def parent(self) -> dict[str, str]:
        """The MLflow run of the sweep, as `remember_parent` was told; empty if it was not."""
        return self._state().get("parent", {})

    def remember_parent(self, parent: dict[str, str]) -> None:
        self._write(self._state_path, self._state() | {"parent": parent})

    def trial(self, digest: str) -> Trial | None:
        """What is known of a trial; None where it has not ended. Those that failed are tried again, and count as unknown."""
        path = self._trial_path(digest)
        if not path.exists():
            return None
        trial = _read(path)
        return None if trial.state == "failed" else trial

    def trials(self) -> Iterator[Trial]:
        """All that have ended without an error."""
        for path in sorted((self.path / "trials").glob("*.json")):
            trial = _read(path)
            if trial.state != "failed":
                yield trial

    def write(self, digest: str, trial: Trial) -> None:
        self._write(self._trial_path(digest), asdict(trial))

    def _trial_path(self, digest: str) -> Path:
        return self.path / "trials" / f"{digest}.json"

    @property
    def _state_path(self) -> Path:
        return self.path / "sweep.json"

    def _state(self) -> dict[str, Any]:
        return json.loads(self._state_path.read_text()) if self._state_path.exists() else {}

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        """Whole or not at all: a reader after a kill finds no half file."""
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(content, indent=1))
        partial.rename(path)


def trial_digest(config: Config, data_digest: str) -> str:
    """Names a trial by all that decides its result."""
    return _digest(config, data_digest)


def _digest(config: Config, data_digest: str) -> str:
    tree = config.to_dict()
    for name in ("name", "output", "tracking"):
        del tree[name]
    del tree["train"]["eval_every"]  # how often it is scored changes nothing
    return hashlib.sha256(json.dumps([tree, data_digest], sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Trial:
    try:
        return Trial(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a trial's record: {error}; remove the file, and the trial is trained again") from error
