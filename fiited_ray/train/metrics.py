"""Quality of predicted probabilities over all workers: AUC, normalised entropy, log loss, calibration.

Sums and one histogram of logits: states of workers add, and memory does not grow with the rows. (Exact AUC, as torchmetrics and
scikit-learn compute it, keeps every score.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_BINS = 1 << 15
_RANGE = 32.0  # logits beyond +-32 share the outermost bins
_SUMS = 4  # rows, positives, sum of losses, sum of predictions
_WAITING_ROWS = 1 << 16  # most that wait: added together they take a fraction of the operators' calls
STATE_SIZE = _SUMS + 2 * _BINS


class BinaryMetrics:
    """Adds up batches of logits and labels.

    AUC counts pairs inside one of the 32,768 equal bins of logits as ties: it is off by at most half the share of pairs that fall
    into a common bin, below 1e-4 for any score whose density in logits stays under 0.1 per bin width of 0.002.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(_SUMS, dtype=torch.float64)
        self._histogram = torch.zeros(2 * _BINS, dtype=torch.float64)  # negatives, then positives
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_rows = self._added_batches = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add float [B] logits and 0/1 [B] labels, which must not change any more: batches wait for others, to be added together.

        Raises:
            ValueError: for a logit that is NaN or infinite, now or in a later call.
        """
        self._waiting.append((logits.detach(), labels))
        self._waiting_rows += len(labels)
        if self._waiting_rows >= _WAITING_ROWS:
            self._add()

    def state(self) -> Tensor:
        """float64 [65540]: add the states of all workers and give the sum to `from_state`.

        Raises:
            ValueError: for a logit that is NaN or infinite.
        """
        self._add()
        return torch.cat([self._sums, self._histogram])

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
        self.reset()
        self._sums, self._histogram = state[:_SUMS].clone(), state[_SUMS:].clone()

    def compute(self) -> dict[str, float]:
        return self.from_state(self.state())

    @staticmethod
    def from_state(state: Tensor) -> dict[str, float]:
        """auc, ne, logloss, calibration and rows; NaN where they are undefined (no rows, or one class only for auc and ne).

        Normalised entropy is log loss over the entropy of the mean label (He et al. 2014); calibration is the mean prediction over
        the mean label.
        """
        rows, positives, losses, predictions = state[:_SUMS].tolist()
        negative, positive = state[_SUMS : _SUMS + _BINS], state[_SUMS + _BINS :]
        nan = float("nan")
        logloss = losses / rows if rows else nan
        auc = ne = nan
        if 0 < positives < rows:
            below = torch.cumsum(negative, 0) - negative
            auc = float((positive * (below + negative / 2)).sum()) / (positives * (rows - positives))
            mean = positives / rows
            ne = logloss / -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
        return {"auc": auc, "ne": ne, "logloss": logloss, "calibration": predictions / positives if positives else nan, "rows": rows}

    def _add(self) -> None:
        """Add what waits."""
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        if not waiting:
            return
        logits = torch.cat([each for each, _ in waiting]).float().cpu()
        labels = torch.cat([each for _, each in waiting]).float().cpu()
        wrong = (~torch.isfinite(logits)).nonzero()
        if len(wrong):
            batch, row = 0, int(wrong[0])
            value = "NaN" if bool(logits[row].isnan()) else "infinite"
            while row >= len(waiting[batch][1]):
                row -= len(waiting[batch][1])
                batch += 1
            raise ValueError(
                f"the model's logit for row {row} of batch {self._added_batches + batch} is {value} (batches are counted from 0, from "
                "the first that these metrics got); lower the learning rates"
            )
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        predictions = torch.sigmoid(logits)
        rows = torch.tensor(len(labels), dtype=torch.float64)
        self._sums += torch.stack([rows, *(each.sum(dtype=torch.float64) for each in (labels, losses, predictions))])
        bins = ((logits.clamp(-_RANGE, _RANGE) + _RANGE) * ((_BINS - 1) / (2 * _RANGE))).long() + labels.long() * _BINS
        self._histogram += torch.bincount(bins, minlength=2 * _BINS)
        self._added_batches += len(waiting)
