"""Pooling and its derivatives: against torch's own, by numerical gradients, and as torch wants operators to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fiited_ray.store import ops

CHUNK, CHUNKS = 2, 3


def example(dtype: torch.dtype, weighted: bool, mean: bool) -> tuple[Tensor, Tensor, ops.Bags]:
    """Five rows of widths 0..3, two features, three batch rows, empty and repeated lookups among them."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.tensor([3, 1, 0, 2, 3], dtype=torch.uint8)
    values = torch.randn(int(widths.sum()) * CHUNK, generator=generator, dtype=dtype)
    inverse = torch.tensor([0, 1, 1, 2, 4, 3, 3, 0], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 4, 5, 8, 8])
    weights = torch.rand(8, generator=generator, dtype=dtype) if weighted else None
    return values, widths, ops.Bags(inverse, offsets, weights, 2, mean, CHUNK, CHUNKS)


def full_table(values: Tensor, widths: Tensor) -> Tensor:
    """Rows padded with zeros to full width."""
    rows, at = [], 0
    for width in widths.tolist():
        row = torch.zeros(CHUNK * CHUNKS, dtype=values.dtype)
        row[: width * CHUNK] = values[at : at + width * CHUNK]
        at += width * CHUNK
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_pooling_equals_an_embedding_bag_over_padded_rows(weighted: bool, mean: bool) -> None:
    values, widths, bags = example(torch.float64, weighted, mean)
    table = full_table(values, widths)
    expected = torch.zeros(3, 2, CHUNK * CHUNKS, dtype=torch.float64)
    for feature in range(2):
        for row in range(3):
            begin, end = bags.offsets[feature * 3 + row].item(), bags.offsets[feature * 3 + row + 1].item()
            for lookup in range(begin, end):
                share = 1 / (end - begin) if mean else 1.0
                weight = share if bags.weights is None else share * bags.weights[lookup]
                expected[row, feature] += weight * table[bags.inverse[lookup]]
    torch.testing.assert_close(ops.pool(values, widths, bags), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_numerical_gradients_agree(weighted: bool, mean: bool) -> None:
    values, widths, bags = example(torch.float64, weighted, mean)
    values.requires_grad_()
    if bags.weights is None:
        assert torch.autograd.gradcheck(lambda v: ops.pool(v, widths, bags), (values,))
    else:
        bags.weights.requires_grad_()
        assert torch.autograd.gradcheck(lambda v, w: ops.pool(v, widths, bags._replace(weights=w)), (values, bags.weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_keeps_torchs_rules(weighted: bool) -> None:
    values, widths, bags = example(torch.float32, weighted, mean=True)
    arguments = (values.requires_grad_(), widths, bags.inverse, bags.offsets, bags.weights, 2, True, CHUNK, CHUNKS)
    torch.library.opcheck(ops.ops(values.device.type).pool.default, arguments)


def test_lookups_without_pooling_are_bags_of_one() -> None:
    values, widths, bags = example(torch.float32, weighted=False, mean=False)
    each = bags._replace(offsets=torch.arange(9), features=1)
    torch.testing.assert_close(ops.pool(values, widths, each)[:, 0], full_table(values, widths)[bags.inverse.long()])


def test_an_empty_batch_pools_to_nothing() -> None:
    bags = ops.Bags(torch.empty(0, dtype=torch.int32), torch.tensor([0]), None, 2, True, CHUNK, CHUNKS)
    assert ops.pool(torch.empty(0), torch.empty(0, dtype=torch.uint8), bags).shape == (0, 2, CHUNK * CHUNKS)


def test_the_wire_gradient_keeps_live_dimensions_and_folds_the_rest() -> None:
    _, widths, bags = example(torch.float32, weighted=False, mean=False)
    grad = torch.randn(3, 2, CHUNK * CHUNKS, generator=torch.Generator().manual_seed(1))
    wire = ops.wire_gradients(grad, widths, bags)
    full = torch.zeros(len(widths), CHUNK * CHUNKS)
    for feature in range(2):
        for row in range(3):
            for lookup in range(bags.offsets[feature * 3 + row].item(), bags.offsets[feature * 3 + row + 1].item()):
                full[bags.inverse[lookup]] += grad[row, feature]
    sizes = ops.gradient_sizes(widths, CHUNK, CHUNKS).tolist()
    assert sizes == [6, 4, 2, 6, 6]
    for row, part in enumerate(wire.split(sizes)):
        live = max(1, int(widths[row])) * CHUNK  # of an absent row the first chunk, and no more
        torch.testing.assert_close(part[:live], full[row, :live])
        if widths[row] == CHUNKS - 1:  # one chunk missing: its norm survives exactly
            torch.testing.assert_close(part[live:].norm(), full[row, live:].norm())


def test_folding_keeps_the_norm_on_average() -> None:
    chunk, chunks, rows = 8, 4, 4000
    grad = torch.randn(rows, 1, chunk * chunks, generator=torch.Generator().manual_seed(2))
    bags = ops.Bags(torch.arange(rows, dtype=torch.int32), torch.arange(rows + 1), None, 1, False, chunk, chunks)
    folded = ops.wire_gradients(grad, torch.ones(rows, dtype=torch.uint8), bags).reshape(rows, 2 * chunk)[:, chunk:]
    ratio = (folded**2).sum(1).mean() / (grad[:, 0, chunk:] ** 2).sum(1).mean()
    assert abs(float(ratio) - 1) < 0.03


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 2, 4, 5, 8, 8], "offsets fall at feature 0, position 1"),
        ([1, 3, 3, 4, 5, 8, 8], "begin at 0"),
        ([0, 3, 3, 4, 5, 8, 7], "end at the number"),
    ],
)
def test_offsets_that_cannot_be_are_refused(offsets: list[int], message: str) -> None:
    values, widths, bags = example(torch.float32, weighted=False, mean=False)
    with pytest.raises(RuntimeError, match=message):
        ops.pool(values, widths, bags._replace(offsets=torch.tensor(offsets)))


@pytest.mark.parametrize("dim", [1, 5, 8, 33])
def test_vectors_that_are_too_long_or_not_finite_are_cleared_and_counted(dim: int) -> None:
    good = torch.randn(50, 3, dim, generator=torch.Generator().manual_seed(0))
    odd = good.clone()
    odd[0, 0, 0], odd[7, 2, -1], odd[8, 1, dim // 2], odd[49, 2, 0] = float("nan"), float("inf"), -float("inf"), 2e12
    odd[20, 1, 0] = good[20, 1, 0] = 9e11  # not too long
    assert ops.clear_odd(odd, 1e12).tolist() == [4]
    expected = good.clone()
    expected[[0, 7, 8, 49], [0, 2, 1, 2]] = 0
    assert torch.equal(odd, expected)
    assert ops.clear_odd(odd, 1e12).tolist() == [0]
    assert ops.clear_odd(torch.empty(0, 3, dim), 1e12).tolist() == [0]
