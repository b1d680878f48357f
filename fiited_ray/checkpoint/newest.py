"""The newest checkpoint in a run's folder, by what lies there: Ray lists checkpoints at its own pace, and may die before it does.

A checkpoint counts when its manifest, all parts and all files that they name are there, and so are those it builds on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.manifest import CheckpointError, IncompleteError, part_name
from fiited_ray.checkpoint.saved import Saved, open_checkpoint, read_manifest

_log = logging.getLogger(__name__)
_OURS = re.compile(r"checkpoint_\d[\d_.-]*")  # Ray Train names them by date, in order of time; other names are a person's


def newest(folder: Folder, run: str | None = None) -> Saved | None:
    """The complete checkpoint of the highest step, of a run; None where there is none.

    Args:
        folder: OUTPUT/NAME.
        run: whose checkpoints count; None: those of the run that wrote the latest one.

    Raises:
        CheckpointError: when none is complete, and one that counts is damaged.
    """
    there = _look(folder)
    damaged = there.damaged if run is None else []  # whose they are cannot be read
    runs = [run] if run is not None else list(dict.fromkeys(each["run"] for each in there.manifests.values()))
    for each_run in runs:
        for name in there.newest_first(each_run):
            try:
                saved = open_checkpoint(folder.child(name))
                saved.check_sizes()
            except IncompleteError:
                continue
            except CheckpointError as error:
                damaged.append(error)
                continue
            for fault in damaged:
                _log.warning("a checkpoint is passed over: %s", fault)
            return saved
    if damaged:
        raise damaged[0]
    return None


def sweep(folder: Folder, run: str, listed: Iterable[str], keep: int) -> list[str]:
    """Delete folders that a run left behind when it failed, and that nobody else deletes; nothing may be writing checkpoints meanwhile.

    What was not written to its end goes, and checkpoints of this run that Ray does not list, beyond the newest `keep`. Whatever a
    checkpoint that stays builds on stays, too.

    Args:
        listed: names of the folders that Ray knows, and deletes itself when their time has come.

    Returns:
        the names of those that were deleted.
    """
    there = _look(folder)
    unlisted = there.manifests.keys() - set(listed)
    incomplete = there.without_manifest | {name for name in unlisted if not there.has_all_parts(name)}
    old = set([name for name in there.newest_first(run) if name not in incomplete][keep:])
    stay = set(listed)
    for name in there.manifests.keys() - incomplete:
        if name in stay or name not in old:
            stay |= there.chain(name)
    over = sorted((incomplete | old) - stay)
    for name in over:
        folder.child(name).delete()
    return over


@dataclass(frozen=True)
class _There:
    """What lies in a run's folder; of checkpoints, the latest name first."""

    folder: Folder
    manifests: dict[str, dict[str, Any]]
    without_manifest: set[str]
    damaged: list[CheckpointError]  # manifests that cannot be read

    def newest_first(self, run: str) -> list[str]:
        own = [(manifest["step"], name) for name, manifest in self.manifests.items() if manifest["run"] == run]
        return [name for _, name in sorted(own, reverse=True)]

    def has_all_parts(self, name: str) -> bool:
        """Whether all parts are there, also of those that a checkpoint builds on."""
        chain = self.chain(name)
        if not chain <= self.manifests.keys():
            return False
        parts = [(each, part_name(rank)) for each in chain for rank in range(self.manifests[each]["workers"])]
        return all(self.folder.child(each).size(part) is not None for each, part in parts)

    def chain(self, name: str) -> set[str]:
        """A checkpoint and all it builds on, those included that are not there."""
        names = {name}
        while (manifest := self.manifests.get(name)) is not None and manifest["base"] and manifest["base"]["folder"] not in names:
            name = manifest["base"]["folder"]
            names.add(name)
        return names


def _look(folder: Folder) -> _There:
    there = _There(folder, {}, set(), [])
    for name in sorted((each.name for each in folder.folders() if _OURS.fullmatch(each.name)), reverse=True):
        try:
            there.manifests[name] = read_manifest(folder.child(name))
        except IncompleteError:
            there.without_manifest.add(name)
        except CheckpointError as error:
            there.damaged.append(error)
    return there
