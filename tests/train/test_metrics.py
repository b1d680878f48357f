"""Metrics that add up over workers, against scikit-learn's and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from fiited_ray.train.metrics import BinaryMetrics


def draw(kind: str, rows: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    labels = random.random(rows) < 0.2
    logits = {
        "normal": random.normal(size=rows) + labels,
        "wide": 8 * (random.normal(size=rows) + labels),
        "narrow": 0.2 * (random.normal(size=rows) + labels),
        "ties": np.round(random.normal(size=rows) + labels),
        "equal": np.full(rows, 0.3),
        "extreme": np.where(labels, 40.0, -40.0) * random.choice([1, 1, 1, -1], rows),
    }[kind]
    return torch.from_numpy(logits).float(), torch.from_numpy(labels).float()


@pytest.mark.parametrize("kind", ["normal", "wide", "narrow", "ties", "equal", "extreme"])
def test_auc_is_scikit_learns(kind: str) -> None:
    logits, labels = draw(kind)
    metrics = BinaryMetrics()
    metrics.update(logits, labels)
    assert metrics.compute()["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=2e-4)


def test_log_loss_entropy_and_calibration_are_their_formulas() -> None:
    logits, labels = draw("normal")
    metrics = BinaryMetrics()
    metrics.update(logits, labels)
    found, mean = metrics.compute(), float(labels.mean())
    expected = log_loss(labels, torch.sigmoid(logits.double()))
    assert found["logloss"] == pytest.approx(expected, rel=1e-5)
    assert found["ne"] == pytest.approx(expected / -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean)), rel=1e-5)
    assert found["calibration"] == pytest.approx(float(torch.sigmoid(logits).mean()) / mean, rel=1e-5)
    assert found["rows"] == 20_000


def test_states_of_workers_add_up_to_that_of_all_rows() -> None:
    logits, labels = draw("normal")
    whole, parts = BinaryMetrics(), [BinaryMetrics() for _ in range(3)]
    whole.update(logits, labels)
    for part, metrics in enumerate(parts):
        metrics.update(logits[part::3], labels[part::3])
    summed = BinaryMetrics.from_state(sum((part.state() for part in parts[1:]), parts[0].state()))
    assert summed == pytest.approx(whole.compute(), rel=1e-9)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_has_no_auc_and_no_entropy(label: float) -> None:
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([0.1, 0.2]), torch.full((2,), label))
    found = metrics.compute()
    assert math.isnan(found["auc"])
    assert math.isnan(found["ne"])
    assert found["logloss"] > 0


def test_no_rows_are_no_numbers() -> None:
    metrics = BinaryMetrics()
    metrics.update(torch.empty(0), torch.empty(0))
    assert math.isnan(metrics.compute()["logloss"])
    assert metrics.compute()["rows"] == 0


@pytest.mark.parametrize(("logit", "told"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("rows", [2, 100_000])  # what waits for others, and what is added at once
def test_a_logit_that_is_not_finite_is_an_error_that_names_its_batch_and_row(logit: float, told: str, rows: int) -> None:
    metrics = BinaryMetrics()
    metrics.update(*draw("normal", rows))
    logits, labels = draw("normal", rows)
    logits[1] = logit
    with pytest.raises(ValueError, match=f"row 1 of batch 1 is {told}"):  # noqa: PT012 - in one of these calls, by the number of rows
        metrics.update(logits, labels)
        metrics.compute()


def test_reset_forgets() -> None:
    metrics = BinaryMetrics()
    metrics.update(*draw("normal"))
    metrics.reset()
    assert metrics.compute()["rows"] == 0
