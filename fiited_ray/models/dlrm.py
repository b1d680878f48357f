"""DLRM (Naumov et al. 2019, arXiv 1906.00091): dot products of all pairs of vectors, then a tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from fiited_ray.models.interaction import interact, padded
from fiited_ray.models.towers import Tower


class DLRM(nn.Module):
    """Bottom tower over the dense columns, pairwise dot products of its output and the F vectors, top tower.

    Without dense columns there is no bottom tower, and the products are of the vectors alone.
    """

    def __init__(self, dense_columns: int, features: int, dim: int, bottom: Sequence[int], top: Sequence[int]) -> None:
        super().__init__()
        self.bottom = Tower((dense_columns, *bottom, dim), last_relu=True) if dense_columns else None
        vectors = features + (1 if dense_columns else 0)
        self.columns = padded(vectors * (vectors - 1) // 2 + (dim if dense_columns else 0))  # the last ones are always zero
        self.top = Tower((self.columns, *top, 1), last_relu=False)

    def forward(self, dense_BC: Tensor, vectors_BFD: Tensor) -> Tensor:
        """Logits [B]."""
        below_BD = None if self.bottom is None else self.bottom(dense_BC).to(vectors_BFD.dtype)
        return cast(Tensor, self.top(interact(below_BD, vectors_BFD, self.columns)).flatten())
