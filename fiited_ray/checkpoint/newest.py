"""The newest checkpoint in a run's folder, by what lies there: Ray lists checkpoints at its own pace, and may die before it does.

A checkpoint counts when its manifest, all parts and all files that they name are there, and so are those it builds on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.manifest import CheckpointError, IncompleteError
from fiited_ray.checkpoint.saved import Saved, open_checkpoint

_log = logging.getLogger(__name__)
_OURS = re.compile(r"checkpoint_\d[\d_.-]*")  # Ray Train names them by date, in order of time; other names are a person's


def newest(folder: Folder, run: str | None = None) -> Saved | None:
    """The complete checkpoint of the highest step, of a run; None where there is none.

    Args:
        folder: OUTPUT/NAME.
        run: whose checkpoints count; None: those of the run that wrote the latest one.

    Raises:
        CheckpointError: when none is complete, and one of them is damaged.
    """
    found, _, damaged = _look(folder)
    if not found and damaged:
        raise damaged[0]
    for error in damaged:
        _log.warning("a checkpoint is passed over: %s", error)
    if run is None and found:
        run = found[0].run
    return max((each for each in found if each.run == run), key=_age, default=None)


def sweep(folder: Folder, run: str, listed: Iterable[str], keep: int) -> list[str]:
    """Delete folders that a run left behind when it failed, and that nobody else deletes; nothing may be writing checkpoints meanwhile.

    What was not written to its end goes, and complete checkpoints of this run that Ray does not list, beyond the newest `keep`. Whatever a
    checkpoint that stays builds on stays, too.

    Args:
        listed: names of the folders that Ray knows, and deletes itself when their time has come.

    Returns:
        the names of those that were deleted.
    """
    found, incomplete, _ = _look(folder)
    own = sorted((each for each in found if each.run == run), key=_age, reverse=True)
    stay = set(listed)
    for each in found:
        if each.run != run or each in own[:keep] or each.folder.name in stay:
            stay |= {base.folder.name for base in each.chain()}
    over = [each for each in [*incomplete, *(old.folder for old in own[keep:])] if each.name not in stay]
    for folder_ in over:
        folder_.delete()
    return [each.name for each in over]


def _look(folder: Folder) -> tuple[list[Saved], list[Folder], list[CheckpointError]]:
    """Complete checkpoints, the latest folder first; folders that were not written to their end; what is wrong with the others."""
    found: list[Saved] = []
    incomplete: list[Folder] = []
    damaged: list[CheckpointError] = []
    ours = [each for each in folder.folders() if _OURS.fullmatch(each.name)]
    for each in sorted(ours, key=lambda each: each.name, reverse=True):
        try:
            saved = open_checkpoint(each)
            saved.check_sizes()
            found.append(saved)
        except IncompleteError:
            incomplete.append(each)
        except CheckpointError as error:
            damaged.append(error)
    return found, incomplete, damaged


def _age(saved: Saved) -> tuple[int, str]:
    return saved.step, saved.folder.name
