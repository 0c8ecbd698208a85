"""Sums over rows of each row's part of a gradient, or of the part's square, by module.

Each function takes a module, its input x (None where no weight is wanted), the gradient delta of
the loss by its output, and adds to the sums of "weight" and "bias" that are wanted, which have
their parameters' shapes. It returns the number of rows.

`of` is torch.square, or the identity: a part is a product, whose square is that of its factors.
Products are in place, where autocast leaves them in the dtype of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

Sums = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]

# So many rows are squared at a time: their squares take memory in the dtype of the sums.
_ROWS = 8192


def identity(part: Tensor) -> Tensor:
    return part


def add_linear(module: Any, x: Tensor | None, delta: Tensor, sums: Sums, of: Function) -> int:
    """x: (..., in), delta: (..., out)."""
    delta = delta.reshape(-1, module.out_features)
    dtype = next(iter(sums.values())).dtype
    inputs = None if x is None else x.reshape(-1, module.in_features)
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        sent = of(delta[rows].to(dtype))
        if "bias" in sums:
            sums["bias"].add_(sent.sum(0))
        if inputs is not None:
            sums["weight"].addmm_(sent.mT, of(inputs[rows].to(dtype)))
    return len(delta)


def add_embedding(
    module: Any, tokens: Tensor | None, delta: Tensor, sums: Sums, of: Function
) -> int:
    """tokens: (...), delta: (..., dim)."""
    assert tokens is not None
    total = sums["weight"]
    tokens, delta = tokens.reshape(-1), delta.reshape(-1, module.embedding_dim)
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        sent = of(delta[rows].to(total.dtype))
        if module.padding_idx is not None:
            sent = sent.masked_fill((tokens[rows] == module.padding_idx)[:, None], 0)
        total.index_add_(0, tokens[rows], sent)
    return len(delta)


def add_norm(module: Any, x: Tensor | None, delta: Tensor, sums: Sums, of: Function) -> int:
    """x, delta: (..., *normalized_shape)."""
    shape = module.normalized_shape
    dtype = next(iter(sums.values())).dtype
    delta = delta.reshape(-1, *shape)
    inputs = None if x is None else x.reshape(-1, *shape)
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        sent = delta[rows].to(dtype)
        if "bias" in sums:
            sums["bias"].add_(of(sent).sum(0))
        if inputs is not None:
            norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
            normed = norm(inputs[rows].to(dtype), shape, eps=module.eps)
            sums["weight"].add_(of(sent * normed).sum(0))
    return len(delta)


ADDS: dict[type[nn.Module], Callable[[Any, Tensor | None, Tensor, Sums, Function], int]] = {
    nn.Linear: add_linear,
    nn.Embedding: add_embedding,
    nn.LayerNorm: add_norm,
    nn.RMSNorm: add_norm,
}


def kind_of(module: nn.Module) -> Any:
    """Which of them a module is: its own forward would be another function of its parameters."""
    forward = getattr(module.forward, "__func__", None)
    return next((kind for kind in ADDS if kind.forward is forward), None)
