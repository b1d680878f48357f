"""DLRM (Naumov et al. 2019, arXiv 1906.00091): dot products of all pairs of vectors, then a tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fiited_ray.models.towers import tower


class DLRM(nn.Module):
    """Bottom tower over the dense columns, pairwise dot products of its output and the F vectors, top tower.

    Without dense columns there is no bottom tower, and the products are of the vectors alone.
    """

    def __init__(self, dense_columns: int, features: int, dim: int, bottom: Sequence[int], top: Sequence[int]) -> None:
        super().__init__()
        self.bottom = tower((dense_columns, *bottom, dim), last_relu=True) if dense_columns else None
        vectors = features + (1 if dense_columns else 0)
        rows, columns = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.top = tower((len(rows) + (dim if dense_columns else 0), *top, 1), last_relu=False)

    def forward(self, dense_BC: Tensor, vectors_BFD: Tensor) -> Tensor:
        """Logits [B]."""
        parts = []
        if self.bottom is not None:
            below_BD = self.bottom(dense_BC)
            vectors_BFD = torch.cat([below_BD[:, None], vectors_BFD], 1)
            parts.append(below_BD)
        products = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))
        parts.append(products.flatten(1).index_select(1, cast(Tensor, self.pairs)))
        return cast(Tensor, self.top(torch.cat(parts, 1))[:, 0])
