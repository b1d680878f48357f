"""Stacks of linear layers, initialised as in the DLRM repository: torch's own start makes deep towers' outputs very small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def tower(widths: Sequence[int], *, last_relu: bool) -> nn.Sequential:
    """Linear layers widths[0] -> widths[1] -> ..., with a ReLU behind each, behind the last one only if asked."""
    layers: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        linear = nn.Linear(wide, next_wide)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / (wide + next_wide)))
        nn.init.normal_(linear.bias, std=math.sqrt(1 / next_wide))
        layers += [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))
