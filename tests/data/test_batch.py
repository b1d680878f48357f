"""What a batch promises, and how a broken promise is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fiited_ray.data import Batch, DataError

FEATURES, DENSE = ("user", "tags"), ("age", "price")
# user: [7], [8], [9]; tags: [1, 2], [], [3]
GOOD = Batch(
    dense=torch.zeros(3, 2),
    labels=torch.tensor([0.0, 1.0, 0.0]),
    ids=torch.tensor([7, 8, 9, 1, 2, 3]),
    offsets=torch.tensor([0, 1, 2, 3, 5, 5, 6]),
    weights=torch.ones(6),
)


def refusal(**change: Any) -> str:
    with pytest.raises(DataError) as caught:
        replace(GOOD, **change).validate(FEATURES, DENSE)
    return str(caught.value)


def test_a_good_batch_passes_with_and_without_weights() -> None:
    GOOD.validate(FEATURES, DENSE)
    replace(GOOD, weights=None).validate(FEATURES, DENSE)
    assert GOOD.rows == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_is_split_into_those_of_its_rows(weighted: bool) -> None:
    whole = GOOD if weighted else replace(GOOD, weights=None)
    whole = replace(whole, dense=torch.arange(6.0).view(3, 2), weights=torch.arange(6.0) if weighted else None)
    none, first, none_again, others = whole.split([0, 1, 1, 3], 2)
    for part, rows, ids, offsets in (
        (none, [], [], [0]),
        (first, [0], [7, 1, 2], [0, 1, 3]),
        (none_again, [], [], [0]),
        (others, [1, 2], [8, 9, 3], [0, 1, 2, 2, 3]),
    ):
        part.validate(FEATURES, DENSE)
        assert part.ids.tolist() == ids
        assert part.offsets.tolist() == offsets
        assert torch.equal(part.dense, whole.dense[rows])
        assert torch.equal(part.labels, whole.labels[rows])
        places = [whole.ids.tolist().index(each) for each in ids]
        assert (part.weights is None) if whole.weights is None else torch.equal(part.weights, whole.weights[places])


def test_an_empty_batch_is_split_into_empty_ones() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    whole = Batch(torch.empty(0, 2), torch.empty(0), empty, torch.zeros(1, dtype=torch.int64))
    assert [part.rows for part in whole.split([0, 0], 2)] == [0, 0]


def test_an_empty_batch_passes() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    Batch(torch.empty(0, 2), torch.empty(0), empty, torch.zeros(1, dtype=torch.int64)).validate(FEATURES, DENSE)


def test_falling_offsets_are_named_by_feature_and_row() -> None:
    offsets = torch.tensor([0, 1, 2, 3, 5, 4, 6])
    assert refusal(offsets=offsets) == "feature 'tags', row 1 of the batch: its offsets fall from 5 to 4"


@pytest.mark.parametrize("offsets", [[1, 1, 2, 3, 5, 5, 6], [0, 1, 2, 3, 5, 5, 7], [0, 1, 2, 3, 5, 5, 5]])
def test_offsets_must_span_all_ids(offsets: list[int]) -> None:
    expected = f"offsets go from {offsets[0]} to {offsets[-1]}; they must go from 0 to the number of ids, 6"
    assert refusal(offsets=torch.tensor(offsets)) == expected


def test_a_negative_first_offset_is_refused() -> None:
    assert refusal(offsets=torch.tensor([-1, 1, 2, 3, 5, 5, 6])).startswith("offsets go from -1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_dense_value_that_is_not_finite_is_named_by_column_and_row(value: float) -> None:
    dense = torch.zeros(3, 2)
    dense[2, 1] = value
    assert refusal(dense=dense).startswith(f"dense column 'price', row 2 of the batch: {value}; clean the data")


def test_a_dense_column_without_a_name_is_named_by_its_number() -> None:
    dense = torch.zeros(3, 2)
    dense[1, 1] = float("nan")
    with pytest.raises(DataError, match=r"^dense column 1, row 1 of the batch: nan"):
        replace(GOOD, dense=dense).validate(FEATURES)


def test_a_weight_that_is_not_finite_is_named_by_feature_and_row() -> None:
    weights = torch.ones(6)
    weights[5] = float("nan")
    assert refusal(weights=weights) == "feature 'tags', row 2 of the batch: the weight of an id is nan"


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan")])
def test_a_label_other_than_0_and_1_is_named_by_row_and_value(value: float) -> None:
    assert refusal(labels=torch.tensor([0.0, value, 1.0])) == f"label of row 1 of the batch is {value}; labels are 0 or 1"


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("dense", torch.float64, "torch.float32"),
        ("labels", torch.int64, "torch.float32"),
        ("ids", torch.int32, "torch.int64"),
        ("offsets", torch.int32, "torch.int64"),
        ("weights", torch.float64, "torch.float32"),
    ],
)
def test_a_wrong_dtype_is_named(name: str, dtype: torch.dtype, wanted: str) -> None:
    assert refusal(**{name: getattr(GOOD, name).to(dtype)}) == f"batch.{name} is {dtype}; {wanted} is wanted"


def test_wrong_shapes_are_named() -> None:
    assert refusal(dense=torch.zeros(2, 2)) == "batch.dense has shape (2, 2) for 3 labels"
    assert refusal(dense=torch.zeros(3)) == "batch.dense has shape (3,) for 3 labels"
    assert refusal(offsets=GOOD.offsets[:-1]) == "batch.offsets has 6 entries; 2 features x 3 rows + 1 = 7 are wanted"
    assert refusal(weights=torch.ones(5)) == "batch.weights has 5 entries for 6 ids"
