"""IF-Shampoo on the CPU: the C++ kernel for bfloat16 matrices, else products of whole stacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..reference import matrix
from ..reference.structures import Blocks, Structure
from . import by_reference
from .axes import known_sizes, structures_of
from .by_reference import IFShampooTensors

PACKED_DEPTH = 32  # block_depth of csrc/packed.h


def ifshampoo_(
    params: list[Tensor],
    grads: list[Tensor],
    *tensors: Any,
    axes: list[int],
    joint_norms: list[bool] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **scalars: Any,
) -> None:
    """The operator on CPU tensors, one bucket after the other.

    In bfloat16 the kernel counts 18 n^3 a step for an n x n matrix, its symmetric products being
    half as dear, and stacks count 24 n^3.
    """
    if by_reference.skips(found_inf):
        return
    grads = by_reference.unscaled(grads, grad_scale)
    every = IFShampooTensors(params, grads, *tensors)
    first = 0
    for bucket, count in enumerate(axes):
        structures = structures_of(every.factors, joint_norms, first, first + count)
        first += count
        own = by_reference.take_bucket(bucket, every, axes)
        if kernel_serves("_ifshampoo_bf16_", own.params, own.residuals, structures):
            _in_the_kernel(own, scalars)
        elif count == 2:
            _stacked(own, structures, **scalars)
        else:
            own = own._replace(factors=unversioned(own.factors))
            by_reference.ifshampoo_(*own, axes=[count], structures=structures, **scalars)


def kernel_serves(
    name: str, params: list[Tensor], residuals: list[Tensor], structures: Sequence[Structure]
) -> bool:
    """Whether the C++ kernel serves a bucket of these parameters.

    residuals, structures: one an axis. Blocks are served whose size is a multiple of 32, how deep
        the kernel packs, and which are bounded each by itself.
    """
    return (
        len(residuals) == 2
        and all(residual.numel() for residual in residuals)
        and not any(
            isinstance(s, Blocks) and (s.joint_norm or s.block % PACKED_DEPTH) for s in structures
        )
        and all(p.dtype != torch.float64 for p in params)
        and hasattr(torch.ops.rootfree_fused, name)  # the extension is built
        and torch.ops.rootfree_fused._bf16_kernel_runs()
    )


@contextmanager
def contiguous_copies(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The tensors, with a copy of each that is not contiguous, which is written back at the end."""
    copies = [[t.contiguous() for t in tensors] for tensors in lists]
    yield copies
    for originals, updated in zip(lists, copies, strict=True):
        for original, result in zip(originals, updated, strict=True):
            if result is not original:
                original.copy_(result)


def _in_the_kernel(own: IFShampooTensors, scalars: dict[str, Any]) -> None:
    with contiguous_copies(own.params, own.buffers) as (params, buffers):
        grads = [g.contiguous() for g in own.grads]
        operands = own._replace(params=params, grads=grads, buffers=buffers)
        sizes = known_sizes(own.params[0], own.factors)
        torch.ops.rootfree_fused._ifshampoo_bf16_(*operands, sizes=sizes, **scalars)


def _stacked(
    own: IFShampooTensors,
    structures: Sequence[Structure],
    *,
    update_factors: bool,
    refresh_products: bool,
    maximize: bool,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    bound: float | None = None,
    **scalars: float,
) -> None:
    sizes = known_sizes(own.params[0], own.factors)
    dtype = product_dtype(own.factors)
    grad = torch.stack([g.reshape(sizes) for g in own.grads])
    lowest, highest = torch.aminmax(grad.flatten(1), dim=1)
    if bool((torch.maximum(-lowest, highest) > matrix.LARGEST_GRADIENT).any()):
        grad = matrix.limited(grad)
    grad = grad.to(dtype)
    factors = unversioned(own.factors)
    if update_factors:
        is_zero = (lowest == 0) & (highest == 0)  # of which K and m learn nothing
        kept = _rows(is_zero, factors, own.residuals, own.momenta)
        _update_factors(grad, structures, factors, own.residuals, own.momenta, **scalars)
        for stack, rows in kept:
            stack[is_zero] = rows
    if update_factors or refresh_products:
        make_products(factors, own.products)
    update = preconditioned(-grad if maximize else grad, structures, factors, own.products)
    p = torch.stack([param.reshape(sizes) for param in own.params])
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    buffer = None
    if own.buffers:
        buffer = torch.stack([b.reshape(sizes) for b in own.buffers])
    matrix.apply_(
        p,
        update,
        buffer,
        lr=own.lr.double(),
        momentum=momentum,
        weight_decay=weight_decay,
        decoupled=decoupled,
        bound=math.inf if bound is None else bound,
    )
    scatter(p, own.params)
    if buffer is not None:
        scatter(buffer, own.buffers)


def _rows(chosen: Tensor, *lists: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each stack with a copy of the chosen of its matrices, if there are any."""
    stacks = [stack for stacks in lists for stack in stacks if stack.numel()]
    return [(stack, stack[chosen]) for stack in stacks] if chosen.any() else []


def unversioned(factors: list[Tensor]) -> list[Tensor]:
    """Aliases through which the factors change without a sign that the products are stale."""
    return [factor.data for factor in factors]


def product_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """Of the products of a bucket: that of its matrices, if it has any."""
    return next((f.dtype for f in factors if f.dim() > 2), factors[0].dtype)


def make_products(factors: Sequence[Tensor], products: Sequence[Tensor]) -> None:
    """K K^T of each that is kept."""
    for factor, product in zip(factors, products, strict=True):
        if product.numel():
            torch.matmul(factor, factor.mT, out=product.data)


def preconditioned(
    update: Tensor,
    structures: Sequence[Structure],
    factors: Sequence[Tensor],
    products: Sequence[Tensor],
) -> Tensor:
    """C C^T N K K^T of each matrix of a stack, by the products that are kept."""
    for axis, (structure, factor, product) in enumerate(
        zip(structures, factors, products, strict=True)
    ):
        if product.numel():
            update = times(update, structure, product, axis)
        else:
            update = times(update, structure, factor, axis)
            update = times(update, structure, factor, axis, transposed=True)
    return update


def _update_factors(
    grad: Tensor,
    structures: Sequence[Structure],
    factors: list[Tensor],
    residuals: list[Tensor],
    momenta: list[Tensor],
    *,
    factor_lr: float,
    factor_momentum: float,
    damping: float,
    batch_size: float,
) -> None:
    values = [
        matrix.join(factor, residual) if residual.numel() else factor
        for factor, residual in zip(factors, residuals, strict=True)
    ]
    axes = list(zip(structures, factors, values, momenta, strict=True))
    sizes = grad.shape[1:]
    mean_squares = [s.square_sum(v) / d for s, v, d in zip(structures, values, sizes, strict=True)]
    transformed = times(times(grad, structures[0], factors[0], 0), structures[1], factors[1], 1)
    decay, weight = factor_momentum, (1 - factor_momentum) / 2  # of the old m and of 2 H
    for axis, (structure, factor, value, m) in enumerate(axes):
        each = (-1, *[1] * (factor.dim() - 1))  # one number a matrix
        unfolded = transformed.mT if axis else transformed
        new = m.to(value.dtype)
        scale = weight * batch_size / unfolded.shape[2]
        # In float32 where the factor is diagonal and what it transforms is bfloat16.
        wide = unfolded if structure.is_dense else unfolded.to(value.dtype)
        structure.average_gram_(new, wide, decay=decay, weight=scale)
        square = structure.square(factor).to(value.dtype)
        new.addcmul_(square, damping * mean_squares[1 - axis].view(each), value=weight)
        structure.add_identity_(new, -weight, sizes[axis])
        new.clamp_(-matrix.LARGEST_MOMENTUM, matrix.LARGEST_MOMENTUM)
        m.copy_(new)
        step = factor_lr / structure.norms(new).clamp_min(1)
        product = structure.product(factor, m).to(value.dtype)
        value.addcmul_(product, step, value=-1)
    for factor, residual, value in zip(factors, residuals, values, strict=True):
        if residual.numel():
            high, low = matrix.split(value)
            factor.copy_(high)
            residual.copy_(low)


def times(
    x: Tensor, structure: Structure, factor: Tensor, axis: int, *, transposed: bool = False
) -> Tensor:
    """F^T X on axis 0, X F on axis 1; transposed F X and X F^T."""
    if axis == 0:
        return structure.left(factor, x, transposed=not transposed).to(x.dtype)
    return structure.right(x, factor, transposed=transposed).to(x.dtype)


def scatter(stacked: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = [part.view(t.shape) for part, t in zip(stacked.unbind(), tensors, strict=True)]
    torch._foreach_copy_(list(tensors), parts)
