"""The dense parameters as one vector: one operator where each of them would need its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLACE = 16  # each begins at a multiple of so many numbers, which is where a cache line begins


def joined(model: nn.Module) -> tuple[nn.Parameter, Tensor]:
    """A model's parameters one behind the other, and their gradients likewise, of which they and theirs are views from now on.

    Gradients are added to what is there, and have to be set to zero, not to None. Gaps stay zero.
    """
    parameters = list(model.parameters())
    places = [0]
    for each in parameters:
        places.append(places[-1] + -(-each.numel() // _PLACE) * _PLACE)
    values = nn.Parameter(parameters[0].new_zeros(places[-1]))
    values.grad = gradient = torch.zeros_like(values.data)
    for each, place in zip(parameters, places[:-1], strict=True):
        mine = slice(place, place + each.numel())
        values.data[mine] = each.data.reshape(-1)
        each.data = values.data[mine].view_as(each)
        each.grad = gradient[mine].view_as(each)
    return values, gradient
