"""DLRM's interaction as one operator: no copy that joins the vectors, and only the half of the products that is used."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fiited_ray.store.ops import host_ops

_ROW_MULTIPLE = 16  # floats in a cache line: matrix products write rows of whole lines about twice as fast as others


def padded(width: int) -> int:
    """Columns that `interact` gives for `width` numbers: a whole number of cache lines, as matrix products want their rows."""
    return -(-width // _ROW_MULTIPLE) * _ROW_MULTIPLE


def interact(below_BD: Tensor | None, vectors_BFD: Tensor, columns: int) -> Tensor:
    """[B, columns]: `below` itself, the dot products of vector i with each j < i (`below`, if there is one, is vector 0), zeros."""
    if vectors_BFD.device.type == "cpu" and vectors_BFD.dtype == torch.float32:
        return cast(Tensor, _Interact.apply(below_BD, vectors_BFD, columns))  # type: ignore[no-untyped-call]
    return interact_plain(below_BD, vectors_BFD, columns)


def interact_plain(below_BD: Tensor | None, vectors_BFD: Tensor, columns: int) -> Tensor:
    """The same in torch's own operators, on any device and dtype."""
    parts = []
    if below_BD is not None:
        parts.append(below_BD)
        vectors_BFD = torch.cat([below_BD[:, None], vectors_BFD], 1)
    count = vectors_BFD.shape[1]
    rows, others = torch.tril_indices(count, count, -1, device=vectors_BFD.device)
    parts.append(torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2)).flatten(1).index_select(1, rows * count + others))
    joined = torch.cat(parts, 1)
    return nn.functional.pad(joined, (0, columns - joined.shape[1]))


class _Interact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Tensor | None, vectors: Tensor, columns: int) -> Tensor:
        below, vectors = None if below is None else below.contiguous(), vectors.contiguous()
        ctx.save_for_backward(below, vectors)
        joined: Tensor = host_ops().interact(below, vectors, columns)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        below, vectors = ctx.saved_tensors
        grad_below, grad_vectors = host_ops().interact_backward(grads[0].contiguous(), below, vectors)
        return None if below is None else grad_below, grad_vectors, None
