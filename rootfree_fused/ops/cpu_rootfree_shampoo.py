"""Root-free Shampoo on the CPU: the C++ kernel for bfloat16 matrices, else products of stacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import matrix
from ..reference.rootfree_shampoo import ROW_DAMPING, shape_scale
from ..reference.structures import structure_of_stack
from . import by_reference
from .axes import known_sizes
from .by_reference import RootFreeShampooTensors
from .cpu_matrix import (
    contiguous_copies,
    kernel_serves,
    make_products,
    preconditioned,
    product_dtype,
    scatter,
    times,
    unversioned,
)


def rootfree_shampoo_(
    params: list[Tensor],
    grads: list[Tensor],
    *tensors: Any,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **scalars: Any,
) -> None:
    """The operator on CPU tensors, one bucket after the other.

    In bfloat16 the kernel counts 24 n^3 a step for an n x n matrix, its symmetric products being
    half as dear, and stacks count 36 n^3.
    """
    if by_reference.skips(found_inf):
        return
    grads = by_reference.unscaled(grads, grad_scale)
    every = RootFreeShampooTensors(params, grads, *tensors)
    for bucket in range(len(every.factors) // 2):
        own = by_reference.take_pair(bucket, every)
        structures = list(map(structure_of_stack, own.factors))
        if kernel_serves("_rootfree_shampoo_bf16_", own.params, own.residuals, structures):
            _in_the_kernel(own, scalars)
        else:
            _stacked(own, **scalars)


def _in_the_kernel(own: RootFreeShampooTensors, scalars: dict[str, Any]) -> None:
    with contiguous_copies(own.params, own.buffers) as (params, buffers):
        grads = [g.contiguous() for g in own.grads]
        operands = own._replace(params=params, grads=grads, buffers=buffers)
        sizes = known_sizes(own.params[0], own.factors)
        torch.ops.rootfree_fused._rootfree_shampoo_bf16_(*operands, sizes=sizes, **scalars)


def _stacked(
    own: RootFreeShampooTensors,
    *,
    update_factors: bool,
    refresh_products: bool,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    update_rms: float,
    row_beta: float | None,
    maximize: bool,
) -> None:
    factors = unversioned(own.factors)
    structures = list(map(structure_of_stack, factors))
    sizes = known_sizes(own.params[0], factors)
    wide = torch.promote_types(own.grams[0].dtype, own.buffers[0].dtype)
    grad = _scaled(torch.stack([g.reshape(sizes) for g in own.grads]).to(wide), 1.0)
    grad = -grad if maximize else grad
    buffer = torch.stack([b.reshape(sizes) for b in own.buffers]).to(wide)
    buffer.lerp_(grad, 1 - beta1)
    ahead = buffer * beta1 + grad * (1 - beta1)
    scatter(buffer, own.buffers)

    if update_factors:
        learns = grad.flatten(1).any(1)
        _update_roots(grad, learns, own.grams, factors, own.residuals, beta2, damping)
    if update_factors or refresh_products:
        make_products(factors, own.products)
    update = preconditioned(ahead.to(product_dtype(factors)), structures, factors, own.products)
    update = update.to(wide)
    if row_beta is not None:
        update = _scaled(update, 1.0)
        rows = torch.stack(own.rows).to(wide)
        weights = own.steps.to(rows.dtype).reciprocal().clamp_min(1 - row_beta).unsqueeze(1)
        rows.lerp_(update.square().mean(2), weights)
        scatter(rows, own.rows)
        update = update / (rows + ROW_DAMPING).sqrt().unsqueeze(2)
    update = _scaled(update, update_rms * shape_scale(*sizes))

    p = torch.stack([param.reshape(sizes) for param in own.params])
    p = p.to(torch.promote_types(p.dtype, wide))
    scatter(p - own.lr.double() * weight_decay * p - own.lr.double() * update, own.params)


def _update_roots(
    grad: Tensor,
    learns: Tensor,
    grams: list[Tensor],
    factors: list[Tensor],
    residuals: list[Tensor],
    beta2: float,
    damping: float,
) -> None:
    """`reference.update_roots_` of a stack; only what `learns` does, whose gradient is not zero."""
    dtype = product_dtype(factors)
    a, b = structures = list(map(structure_of_stack, factors))
    grad = grad.to(dtype)
    seen = times(grad, b, factors[1], 1), times(grad, a, factors[0], 0).mT
    for structure, gram, factor, residual, unfolded in zip(
        structures, grams, factors, residuals, seen, strict=True
    ):
        size = unfolded.shape[1]
        each = (-1, *[1] * (factor.dim() - 1))  # one number a matrix
        new = structure.gram(unfolded if structure.is_dense else unfolded.to(gram.dtype))
        weight = (learns.to(gram.dtype) * (1 - beta2)).view(each)
        _lerp(gram, new.to(gram.dtype) / unfolded.shape[2], weight)
        lam = (damping / size * structure.diagonal(gram).flatten(1).sum(1)).view(each)
        if not structure.is_dense:
            factor.copy_(torch.where(learns.view(each), (gram + lam).rsqrt(), factor))
            continue
        value = matrix.join(factor, residual) if residual.numel() else factor
        flat = gram.to(dtype).flatten(0, -3), factor.flatten(0, -3)
        ahead = torch.baddbmm((lam * value).to(dtype).flatten(0, -3), *flat).view(factor.shape)
        # The identity goes before the rounding: near the end E is small beside it.
        residue = factor.mT.to(gram.dtype) @ ahead.to(gram.dtype)
        structure.add_identity_(residue, -1, size)
        error = residue.to(dtype)
        squared = (error @ error).to(gram.dtype)
        bound = torch.fmin(structure.norms(residue), structure.norms(squared).sqrt())
        step = torch.where(learns.view(each), 0.5 / bound.clamp_min(1), 0.0)
        moved = value - step * (factor @ error).to(value.dtype)
        value = torch.where(learns.view(each), moved, value)
        by_reference.store(value, factor, residual if residual.numel() else None)


def _lerp(average: Tensor, new: Tensor, weight: Tensor) -> None:
    """Towards the new, which need not be finite where the weight is 0."""
    average.copy_(torch.where(weight == 0, average, torch.lerp(average, new, weight)))


def _scaled(x: Tensor, rms: float) -> Tensor:
    """`reference.rootfree_shampoo.scaled` of each matrix of a stack."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(tiny)
    return x * (rms / x.square().mean((1, 2), keepdim=True).sqrt().clamp_min(tiny**0.5))
