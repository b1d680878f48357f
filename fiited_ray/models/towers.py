"""Stacks of linear layers, initialised as in the DLRM repository: torch's own start makes deep towers' outputs very small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fiited_ray.store.ops import host_ops


class Tower(nn.Module):
    """Linear layers widths[0] -> widths[1] -> ..., with a ReLU behind each, behind the last one only if asked."""

    def __init__(self, widths: Sequence[int], *, last_relu: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.last_relu = last_relu
        for wide, next_wide in pairwise(widths):
            layer = nn.Linear(wide, next_wide)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (wide + next_wide)))
            nn.init.normal_(layer.bias, std=math.sqrt(1 / next_wide))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, widths[0]] -> [B, widths[-1]]."""
        for number, layer in enumerate(cast(Iterable[nn.Linear], self.layers), 1):
            x = linear(x, layer.weight, layer.bias, relu=self.last_relu or number < len(self.layers))
        return x


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    """x [B, I] times weight [O, I], plus bias [O], with a ReLU if asked.

    In float32 on a CPU by oneDNN, whose products are up to twice as fast as those that torch takes by default (MKL's) on an AMD
    processor. Its ReLU is not used: it makes a zero of what is not a number.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and torch.backends.mkldnn.is_available():
        return cast(Tensor, _Linear.apply(x, weight, bias, relu))  # type: ignore[no-untyped-call]
    x = nn.functional.linear(x, weight, bias)
    return nn.functional.relu(x) if relu else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out = _product(x, weight, bias)
        if relu:
            out.relu_()
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, out = ctx.saved_tensors
        grad, narrowing = grads[0].contiguous(), len(weight) < x.shape[1]
        # The first factor of a product has whole rows. Where it is transposed it has to be copied, so that is the narrower one.
        if out is None:
            columns, grad_bias = grad.t(), grad.sum(0)
        else:
            grad, columns, grad_bias = host_ops().relu_backward(grad, out, narrowing)
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _product(columns, x.t()) if narrowing else _product(x.t(), grad.t()).t(), grad_bias, None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [N, K] times b [M, K] transposed, plus bias [M]: [N, M]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out
