"""Batch operators around the store, with their derivatives.

Shapes: B rows, F features, N lookups, U distinct keys, W workers, k chunks of c dimensions, D = k * c.
Bag (f, b) holds lookups offsets[f*B+b] .. offsets[f*B+b+1], feature by feature:

    inverse   [ u u u | u | u u |   | u u ]     offsets [0 3 4 6 6 8]
                f0,b0  f0,b1 f0,b2 ... f1,b0

and row u of `values` stands behind row u-1, `widths[u]` * c numbers long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fiited_ray.store import _extension


class Deduped(NamedTuple):
    """Distinct keys of a batch, grouped by the worker that owns them."""

    keys: Tensor  # int64 [U]
    tables: Tensor  # int32 [U]
    counts: Tensor  # int32 [U]: lookups of each
    inverse: Tensor  # int32 [N]: position among the U
    splits: Tensor  # int64 [W]: how many belong to each worker


class Bags(NamedTuple):
    """How lookups are pooled: the shape, once for forward and backward."""

    inverse: Tensor  # int32 [N]
    offsets: Tensor  # int64 [F*B+1]
    weights: Tensor | None  # float [N]
    features: int
    mean: bool
    chunk: int
    chunks: int


def ops(device: str) -> Any:
    """The operators of a type of device ("cpu", "cuda"), loaded and differentiable.

    Raises:
        ImportError: when the extension cannot be loaded.
    """
    return _differentiable(_extension.NAMESPACES[device])


def host_ops() -> Any:
    """The operators beside the store's, of which there are the CPU's only: for ids, layers and sockets.

    Raises:
        ImportError: when the extension cannot be loaded.
    """
    return _differentiable("fiited")


@cache
def _differentiable(namespace: str) -> Any:
    loaded = _extension.load(namespace)
    torch.library.register_fake(f"{namespace}::pool", _pool_fake)
    torch.library.register_fake(f"{namespace}::pool_backward", _pool_backward_fake)
    torch.library.register_fake(f"{namespace}::pool_weights_backward", _pool_weights_backward_fake)
    torch.library.register_autograd(f"{namespace}::pool", _pool_grad(loaded), setup_context=_pool_context)
    return loaded


def dedup_ids(ids: Tensor, feature_ends: Tensor, feature_tables: Tensor, seed: int, workers: int) -> Deduped:
    """Keys of raw ids (int64 [N], feature by feature; feature f ends at feature_ends[f]), each once, with counts."""
    return Deduped(*ops(ids.device.type).dedup_ids(ids, feature_ends, feature_tables, (seed + 2**63) % 2**64 - 2**63, workers))


def dedup_keys(keys: Tensor, tables: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge keys that several workers asked for; their counts are summed. Returns keys, tables, counts, inverse."""
    merged: tuple[Tensor, Tensor, Tensor, Tensor] = ops(keys.device.type).dedup_keys(keys, tables, counts)
    return merged


def pool(values: Tensor, widths: Tensor, bags: Bags) -> Tensor:
    """Pool rows into [B, F, D]; dimensions a row does not have count as zero. Differentiable in values and weights."""
    pooled: Tensor = ops(values.device.type).pool(
        values, widths, bags.inverse, bags.offsets, bags.weights, bags.features, bags.mean, bags.chunk, bags.chunks
    )
    return pooled


def wire_gradients(grad_pooled: Tensor, widths: Tensor, bags: Bags) -> Tensor:
    """Gradient of each row in the form that travels: the live dimensions, then the missing chunks folded into one.

    Of absent rows it is the first chunk's, as it is.
    """
    folded: Tensor = ops(grad_pooled.device.type).pool_backward(
        grad_pooled, widths, bags.inverse, bags.offsets, bags.weights, bags.features, bags.mean, bags.chunk, bags.chunks, True
    )
    return folded


def lookup_norms(grad_pooled: Tensor, rows: int, bags: Bags) -> Tensor:
    """float32 [rows]: the sum of the norms of each lookup's own full-width gradient."""
    norms: Tensor = ops(grad_pooled.device.type).lookup_norms(
        grad_pooled, rows, bags.inverse, bags.offsets, bags.weights, bags.features, bags.mean, bags.chunk * bags.chunks
    )
    return norms


def clear_odd(gradients: Tensor, longest: float) -> Tensor:
    """Make zeros of the vectors (float32 [..., D], contiguous) that are longer, or not finite; int64 [1]: how many, on their device."""
    found: Tensor = ops(gradients.device.type).clear_odd(gradients, gradients.shape[-1], longest)
    return found


def gradient_sizes(widths: Tensor, chunk: int, chunks: int) -> Tensor:
    """int64 [U]: numbers that a row's gradient takes on the wire."""
    return torch.where(widths == 0, 1, (widths.long() + 1).clamp(max=chunks)) * chunk


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, widths, inverse, offsets, weights, *ctx.shape = inputs
    ctx.save_for_backward(values, widths, inverse, offsets, weights)


def _pool_grad(of: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, widths, inverse, offsets, weights = ctx.saved_tensors
        features, mean, chunk, chunks = ctx.shape
        grad = grad.contiguous()
        grad_values = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_values = of.pool_backward(grad, widths, inverse, offsets, weights, features, mean, chunk, chunks, False)
        if weights is not None and ctx.needs_input_grad[4]:
            grad_weights = of.pool_weights_backward(grad, values, widths, inverse, offsets, features, mean, chunk, chunks)
        return grad_values, None, None, None, grad_weights, None, None, None, None

    return backward


def _pool_fake(
    values: Tensor,
    widths: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    features: int,
    mean: bool,
    chunk: int,
    chunks: int,
) -> Tensor:
    return values.new_empty(((offsets.numel() - 1) // features, features, chunk * chunks))


def _pool_backward_fake(
    grad_out: Tensor,
    widths: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    features: int,
    mean: bool,
    chunk: int,
    chunks: int,
    fold: bool,
) -> Tensor:
    return grad_out.new_empty(torch.library.get_ctx().new_dynamic_size())


def _pool_weights_backward_fake(
    grad_out: Tensor, values: Tensor, widths: Tensor, inverse: Tensor, offsets: Tensor, features: int, mean: bool, chunk: int, chunks: int
) -> Tensor:
    return grad_out.new_empty(inverse.numel())
