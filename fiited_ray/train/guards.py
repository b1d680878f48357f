"""What keeps a step that went wrong from the rows: losses and gradients that are not finite, and a store that contradicts itself."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiited_ray.embedding import LONGEST_GRADIENT

if TYPE_CHECKING:
    from fiited_ray.train.loop import Worker

_log = logging.getLogger(__name__)
_MOST_IN_A_ROW = 100


@dataclass
class SkippedSteps:
    """Steps without a finite loss or dense gradient (`train.not_finite=skip`)."""

    steps: int = 0
    in_a_row: int = 0

    def count(self, step: int) -> None:
        """One more.

        Raises:
            ValueError: when nothing but such steps has come for long.
        """
        self.steps += 1
        self.in_a_row += 1
        if self.in_a_row >= _MOST_IN_A_ROW:
            raise ValueError(
                f"step {step}: {self.in_a_row} steps in a row had no finite loss; the data or the model are lost: look into the data, "
                "or lower train.lr and embedding.lr"
            )


def usable(worker: Worker, logits_B: Tensor, loss_sum: float) -> bool:
    """Whether a step can be learned from, asked before its backward pass, when no row has been touched; the same on every worker.

    Args:
        loss_sum: not finite if any logit is not.

    Raises:
        ValueError: with `train.not_finite=error`, for a loss that is not finite; or when too many steps in a row have been skipped.
    """
    finite = math.isfinite(loss_sum)
    if worker.config.train.not_finite == "error":
        if not finite:
            raise ValueError(_told(worker, logits_B))
        return True
    if int(worker.exchange.all_reduce(torch.tensor([int(finite)]))[0]) == worker.exchange.workers:
        return True
    if not finite:
        _log.warning("%s; the step is skipped", _told(worker, logits_B))
    worker.skipped.count(worker.step)
    worker.losses.append(math.nan)
    return False


def learn_dense(worker: Worker) -> None:
    """The dense parameters' step; their gradient, summed here, is the same on every worker, and so is what is decided.

    A gradient whose square is infinite would leave optimizer state that never moves its parameters again.

    Raises:
        ValueError: with `train.not_finite=error`, for a gradient that is not finite or longer than 1e12; or when too many steps in a row
            have been skipped.
    """
    gradient, skips = worker.gradient, worker.config.train.not_finite == "skip"
    if worker.exchange.workers > 1:
        gradient.copy_(worker.exchange.all_reduce(gradient))
    if skips or not gradient.is_cuda:  # a GPU would be waited for; where a run ends with an error, a checkpoint finds it, too
        longest = float(gradient.abs().max())  # NaN if any is
        if not longest <= LONGEST_GRADIENT:
            told = f"step {worker.step}: the dense parameters' gradient reaches {longest:.3g}; {LONGEST_GRADIENT:.0e} can be learned from"
            if not skips:
                raise ValueError(f"{told}; look for huge dense values, or lower train.lr and embedding.lr")
            _log.warning("%s; they skip the step", told)
            worker.skipped.count(worker.step)
            return
    if skips:
        worker.skipped.in_a_row = 0
    worker.optimizer.step()


def check_store(worker: Worker) -> None:
    """Check every invariant of this worker's store (`train.debug`).

    Raises:
        RuntimeError: naming step, worker, row and the invariant that does not hold.
    """
    try:
        worker.shard.check()
    except RuntimeError as error:
        raise RuntimeError(f"step {worker.step}, worker {worker.exchange.rank}: {error}") from None


def _told(worker: Worker, logits_B: Tensor) -> str:
    odd = (~torch.isfinite(logits_B.detach())).nonzero().flatten()
    what = "the sum of the losses is not finite"
    if len(odd):
        row = int(odd[0])
        what = f"the model's logit for row {row} of worker {worker.exchange.rank}'s batch is {float(logits_B[row])}"
    return f"step {worker.step}: {what}; look for huge dense values, or lower train.lr and embedding.lr"
