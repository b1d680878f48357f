"""Stacks of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def tower(widths: Sequence[int], *, last_relu: bool) -> nn.Sequential:
    """Linear layers widths[0] -> widths[1] -> ..., with a ReLU behind each, behind the last one only if asked."""
    layers: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        layers += [nn.Linear(wide, next_wide), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))
