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

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add float [B] logits and 0/1 [B] labels.

        Raises:
            ValueError: for a logit that is NaN or infinite.
        """
        logits, labels = logits.detach().float().cpu(), labels.float().cpu()
        wrong = (~torch.isfinite(logits)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            value = "NaN" if bool(logits[row].isnan()) else "infinite"
            raise ValueError(f"the model's logit for row {row} of the batch is {value}; lower the learning rates")
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        predictions = torch.sigmoid(logits)
        self._sums += torch.stack(
            [torch.tensor(float(len(labels))), labels.sum(), losses.double().sum(), predictions.double().sum()]
        ).double()
        bins = ((logits.clamp(-_RANGE, _RANGE) + _RANGE) * ((_BINS - 1) / (2 * _RANGE))).long() + labels.long() * _BINS
        self._histogram.index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))

    def state(self) -> Tensor:
        """float64 [65540]: add the states of all workers and give the sum to `from_state`."""
        return torch.cat([self._sums, self._histogram])

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
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
