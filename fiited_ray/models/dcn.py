"""DCN-v2 (Wang et al. 2021, arXiv 2008.13535): low-rank cross layers, then a deep tower on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fiited_ray.models.towers import Tower, tower


class CrossLayer(nn.Module):
    """x0 * (U V x + b) + x, with V of rank x width and U of width x rank (the paper's section 4.2)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.v = nn.Linear(width, rank, bias=False)
        self.u = nn.Linear(rank, width)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        narrow = tower(x, [self.v.weight, None], last_relu=False)
        return first * tower(narrow, [self.u.weight, self.u.bias], last_relu=False) + x


class DCNv2(nn.Module):
    """The stacked form: dense columns and all vectors side by side, cross layers, deep tower, logit."""

    def __init__(self, dense_columns: int, features: int, dim: int, layers: int, rank: int, top: Sequence[int]) -> None:
        super().__init__()
        width = dense_columns + features * dim
        self.cross = nn.ModuleList(CrossLayer(width, rank) for _ in range(layers))
        self.deep = Tower((width, *top, 1), last_relu=False)

    def forward(self, dense_BC: Tensor, vectors_BFD: Tensor) -> Tensor:
        """Logits [B]."""
        first = torch.cat([dense_BC, vectors_BFD.flatten(1)], 1)
        x = first
        for layer in self.cross:
            x = layer(first, x)
        return cast(Tensor, self.deep(x).flatten())
