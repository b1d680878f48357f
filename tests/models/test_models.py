"""The dense models against slow formulas, by numerical gradients, and at their edges."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fiited_ray.config import ModelConfig
from fiited_ray.models import DLRM, DCNv2, build_model
from fiited_ray.models.interaction import interact, interact_plain, padded
from fiited_ray.models.towers import tower

KINDS = [ModelConfig(kind="dlrm", bottom=(5,), top=(6,)), ModelConfig(kind="dcnv2", cross_layers=2, cross_rank=3, top=(6,))]


def test_dlrm_multiplies_all_pairs() -> None:
    torch.manual_seed(0)
    model = DLRM(3, 2, 4, (5,), (6,)).double()
    dense, vectors = torch.randn(7, 3).double(), torch.randn(7, 2, 4).double()
    for row in range(7):
        below = model.bottom(dense[row])
        all_vectors = [below, *vectors[row]]
        products = [all_vectors[i] @ all_vectors[j] for i in range(3) for j in range(i)]
        joined = torch.cat([below, torch.stack(products)])
        expected = model.top(nn.functional.pad(joined, (0, model.columns - len(joined))))[0]
        torch.testing.assert_close(model(dense, vectors)[row], expected)


@pytest.mark.parametrize("with_below", [True, False])
@pytest.mark.parametrize(("rows", "features", "dim"), [(130, 26, 32), (5, 3, 8), (7, 17, 20), (3, 33, 64), (2, 2, 4), (0, 3, 8)])
def test_the_interaction_operator_is_the_plain_one_with_its_gradients(with_below: bool, rows: int, features: int, dim: int) -> None:
    torch.manual_seed(0)
    vectors_in = features + with_below
    columns = padded(vectors_in * (vectors_in - 1) // 2 + dim * with_below)
    grad = torch.randn(rows, columns)
    found = []
    for form in (interact, interact_plain):
        torch.manual_seed(1)
        vectors = torch.randn(rows, features, dim, requires_grad=True)
        below = torch.randn(rows, dim, requires_grad=True) if with_below else None
        out = form(below, vectors, columns)
        out.backward(grad)
        found.append([out, vectors.grad, *([below.grad] if below is not None else [])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("last_relu", [True, False])
@pytest.mark.parametrize(
    ("rows", "widths"), [(300, (384, 256)), (300, (384, 256, 64, 1)), (7, (13, 5, 9)), (7, (13, 5)), (1, (3, 1)), (0, (4, 2, 3))]
)
def test_a_float32_tower_and_its_gradients_are_those_of_float64(last_relu: bool, rows: int, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    shapes = [(rows, widths[0])]
    for wide, next_wide in pairwise(widths):
        shapes += [(next_wide, wide), (next_wide,)]
    exact = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for weight in exact[3::2]:
        weight /= weight.shape[1] ** 0.5  # behind the first layer: numbers stay as large as its own
    exact = [each.requires_grad_() for each in exact]
    rounded = [each.detach().float().requires_grad_() for each in exact]
    grad = torch.randn(rows, widths[-1])
    found = []
    for x, *parameters in (rounded, exact):
        out = tower(x, parameters, last_relu=last_relu)
        out.backward(grad.to(out.dtype))
        found.append([out, x.grad, *(each.grad for each in parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


def test_the_last_layer_of_a_tower_may_have_no_bias() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (6, 5), (6,), (3, 6))]
    rounded = [each.detach().float().requires_grad_() for each in exact]
    found = []
    for x, *parameters in (rounded, exact):
        out = tower(x, [*parameters, None], last_relu=False)
        out.sum().backward()
        found.append([out, *(each.grad for each in (x, *parameters))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_in_bfloat16_logits_and_gradients_are_as_near_as_its_numbers_and_logits_are_float32(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config, 3, 2, 4)
    dense, vectors, grad = torch.randn(50, 3), torch.randn(50, 2, 4, requires_grad=True), torch.randn(50)
    found = []
    for bfloat16 in (True, False):
        model.zero_grad()
        vectors.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(dense, vectors)
        logits.backward(grad)
        found.append([logits, vectors.grad, *(each.grad.clone() for each in model.parameters())])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[0][0].bfloat16().float())
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_tower_passes_on_what_is_not_a_number() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    out = tower(x, [torch.ones(3, 2), torch.zeros(3)], last_relu=True)
    assert out.isnan().tolist() == [[True] * 3, [False] * 3]


def test_dcn_crosses_as_the_paper_writes() -> None:
    torch.manual_seed(0)
    model = DCNv2(3, 2, 4, 2, 3, (6,)).double()
    dense, vectors = torch.randn(7, 3).double(), torch.randn(7, 2, 4).double()
    for row in range(7):
        first = torch.cat([dense[row], vectors[row].flatten()])
        x = first
        for layer in model.cross:
            x = first * (layer.u.weight @ (layer.v.weight @ x) + layer.u.bias) + x
        torch.testing.assert_close(model(dense, vectors)[row], model.deep(x)[0])


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (4, 0), (1, 3)])
def test_no_rows_and_no_dense_columns_are_fine(config: ModelConfig, rows: int, columns: int) -> None:
    model = build_model(config, columns, 2, 4)
    logits = model(torch.zeros(rows, columns), torch.zeros(rows, 2, 4))
    assert logits.shape == (rows,)
    (logits.sum() * 1.0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("config", KINDS)
def test_gradients_are_right(config: ModelConfig) -> None:
    torch.manual_seed(1)
    model = build_model(config, 3, 2, 4).double()
    inputs = (torch.randn(3, 3).double().requires_grad_(), torch.randn(3, 2, 4).double().requires_grad_())
    assert torch.autograd.gradcheck(model, inputs)


@pytest.mark.parametrize("config", KINDS)
def test_a_seed_makes_one_model(config: ModelConfig) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(build_model(config, 3, 2, 4)(torch.ones(2, 3), torch.ones(2, 2, 4)))
    assert torch.equal(*made)
