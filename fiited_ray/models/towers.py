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
        layers = cast(Iterable[nn.Linear], self.layers)
        return tower(x, [each for layer in layers for each in (layer.weight, layer.bias)], last_relu=self.last_relu)


def tower(x: Tensor, parameters: Sequence[Tensor | None], *, last_relu: bool) -> Tensor:
    """Linear layers on x [B, I]: weight [O, I] and bias [O] of the first, then of the next; with ReLUs between, and at the end if asked.

    The last bias may be None. In float32 on a CPU by oneDNN, whose products are up to twice as fast as those that torch takes by default
    (MKL's) on an AMD processor, and as one step of the backward pass. oneDNN's ReLU is not used: it makes a zero of what is not a number.
    Under `torch.autocast` in its precision, but for a logit, which is not to be rounded to 8 bits.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and torch.backends.mkldnn.is_available() and not autocast:
        return cast(Tensor, _Tower.apply(x, last_relu, *parameters))  # type: ignore[no-untyped-call]
    for at in range(0, len(parameters), 2):
        weight, bias = cast(Tensor, parameters[at]), parameters[at + 1]
        gives_logit = len(weight) == 1
        with torch.autocast(x.device.type, enabled=autocast and not gives_logit):
            x = nn.functional.linear(x.to(weight.dtype) if gives_logit else x, weight, bias)
        if last_relu or at + 2 < len(parameters):
            x = nn.functional.relu(x)
    return x


class _Tower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, last_relu: bool, *parameters: Any) -> Tensor:
        activations = [x]
        for at in range(0, len(parameters), 2):
            activations.append(_product(activations[-1], parameters[at], parameters[at + 1]))
            if last_relu or at + 2 < len(parameters):
                activations[-1].relu_()
        ctx.last_relu = last_relu
        ctx.save_for_backward(*parameters[::2], *(activations if last_relu else activations[:-1]))
        return activations[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers = (len(ctx.saved_tensors) - ctx.last_relu) // 2
        weights, activations = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        grad, of_parameters = grads[0].contiguous(), []
        for layer in reversed(range(layers)):
            x, weight, narrowing = activations[layer], weights[layer], len(weights[layer]) < activations[layer].shape[1]
            # The first factor of a product has whole rows. Where it is transposed it has to be copied, so that is the narrower one.
            if layer + 1 < len(activations):
                grad, columns, grad_bias = host_ops().relu_backward(grad, activations[layer + 1], narrowing)
            else:
                columns, grad_bias = grad.t(), grad.sum(0) if ctx.needs_input_grad[-1] else None
            of_parameters += [grad_bias, _product(columns, x.t()) if narrowing else _product(x.t(), grad.t()).t()]
            if layer or ctx.needs_input_grad[0]:
                grad = _product(grad, weight.t())
        return grad if ctx.needs_input_grad[0] else None, None, *reversed(of_parameters)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [N, K] times b [M, K] transposed, plus bias [M]: [N, M]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out
