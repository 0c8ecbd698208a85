"""The operators by the specification, one parameter after the other, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import diag, formats, matrix, rootfree_shampoo
from ..reference.formats import random_bits, unpacked, update_in_formats_
from ..reference.rows import ALL_ROWS, Rows
from ..reference.structures import Structure
from .axes import known_sizes, structures_of
from .methods import DiagonalMethod


class IFShampooTensors(NamedTuple):
    """What a call of `ifshampoo_` takes, in its order."""

    params: list[Tensor]
    grads: list[Tensor]
    factors: list[Tensor]
    residuals: list[Tensor]
    momenta: list[Tensor]
    products: list[Tensor]
    buffers: list[Tensor]
    lr: Tensor


class RootFreeShampooTensors(NamedTuple):
    """What a call of `rootfree_shampoo_` takes, in its order."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    rows: list[Tensor]
    grams: list[Tensor]
    factors: list[Tensor]
    residuals: list[Tensor]
    products: list[Tensor]
    steps: Tensor
    lr: Tensor


def unscaled(grads: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """The gradients without the factor of a gradient scaler, in float32 or float64."""
    if grad_scale is None:
        return grads
    inverse = grad_scale.double().reciprocal().reshape(())
    return [g.to(torch.promote_types(g.dtype, torch.float32)) * inverse.to(g.device) for g in grads]


def _parts_of(
    method: DiagonalMethod, parts: list[Tensor] | None, count: int, grad_scale: Tensor | None
) -> list[dict[str, Tensor]]:
    """What each of so many parameters is given of micro-batches, as its reference takes it.

    Squares come without the square of a gradient scaler's factor.
    """
    if not parts:
        return [{} for _ in range(count)]
    if method.parts == "squares":
        parts = unscaled(parts, None if grad_scale is None else grad_scale.double().square())
    return [{"parts": part} for part in parts]


def accumulate_(
    sums: list[Tensor],
    parts: list[Tensor],
    grads: list[Tensor],
    *,
    weight: float,
    signs: bool,
    first: bool,
) -> None:
    """Gradients of micro-batches added up, one parameter after the other."""
    others: Sequence[Tensor | None] = parts or [None] * len(sums)
    for total, part, grad in zip(sums, others, grads, strict=True):
        diag.accumulate_(total, part, grad, weight=weight, signs=signs, first=first)


def skips(found_inf: Tensor | None) -> bool:
    """Whether the scaler found infs; the host waits for the device that counted them."""
    return found_inf is not None and bool(found_inf.item())


def diagonal(method: DiagonalMethod) -> Callable[..., None]:
    """The operator of a diagonal method, by its update of one parameter."""

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        *others: Any,  # lists of states, with `counts` the steps, and lr
        batch_size: Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        parts: list[Tensor] | None = None,
        **scalars: Any,
    ) -> None:
        if skips(found_inf):
            return
        *lists, lr = others
        none = [None] * len(params)
        given = _parts_of(method, parts, len(params), grad_scale)
        columns = [values if values is not None and len(values) else none for values in lists]
        scalars |= {"lr": lr.double(), "batch_size": float(batch_size)}
        rows = zip(params, unscaled(grads, grad_scale), *columns, strict=True)
        for row, own in zip(rows, given, strict=True):
            method.reference(*row, **scalars, **own)

    return run


def lowbit(method: DiagonalMethod) -> Callable[..., None]:
    """The operator of a diagonal method on weights and states in formats of fewer bytes."""

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        *others: Any,  # lists of states, of residuals and of each state's scales, steps and lr
        seeds: list[int],
        firsts: list[int],
        stochastic: bool,
        batch_size: Tensor,
        bias_correction: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        parts: list[Tensor] | None = None,
        **scalars: Any,
    ) -> None:
        if skips(found_inf):
            return
        *lists, steps, lr = others
        none = [None] * len(params)
        count = len(method.states)
        given = _parts_of(method, parts, len(params), grad_scale)
        columns = [values or none for values in lists]
        scalars |= {"lr": lr.double(), "batch_size": float(batch_size)}
        rows = zip(
            params, unscaled(grads, grad_scale), given, steps, seeds, firsts, *columns, strict=True
        )
        for param, grad, part, step, seed, first, *own in rows:
            counted = [step if bias_correction else None] if method.counts else []
            named = scalars | part
            update_in_formats_(
                lambda *tensors, counted=counted, named=named: method.reference(
                    *tensors, *counted, **named
                ),
                param,
                grad,
                own[:count],
                residual=own[count],
                scales=own[count + 1 :],
                random=partial(random_bits, seed, step, first=first, like=param),
                stochastic=stochastic,
            )

    return run


def unpack_(values: list[Tensor], stored: list[Tensor], beside: list[Tensor]) -> None:
    """Weights with residuals, or states with scales, in float32."""
    others: Sequence[Tensor | None] = beside or [None] * len(stored)
    for value, own, other in zip(values, stored, others, strict=True):
        value.copy_(unpacked(own, other))


def pack_(
    stored: list[Tensor],
    beside: list[Tensor],
    values: list[Tensor],
    steps: Tensor,
    *,
    seeds: list[int],
    firsts: list[int],
    stream: int,
    found_inf: Tensor | None = None,
) -> None:
    """What `unpack_` finds again, but for the roundings."""
    if skips(found_inf):
        return
    others: Sequence[Tensor | None] = beside or [None] * len(stored)
    rows = zip(stored, others, values, steps, seeds, firsts, strict=True)
    for own, other, value, step, seed, first in rows:
        random = partial(random_bits, seed, step, first=first, like=value)
        formats.pack_(own, other, value, random, stream)


def ifshampoo_(
    params: list[Tensor],
    grads: list[Tensor],
    factors: list[Tensor],
    residuals: list[Tensor],
    factor_momenta: list[Tensor],
    products: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    axes: list[int],
    update_factors: bool,
    refresh_products: bool,
    factor_lr: float,
    factor_momentum: float,
    damping: float,
    batch_size: float,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    bound: float | None = None,
    joint_norms: list[bool] | None = None,
    sizes: Sequence[int] | None = None,
    structures: Sequence[Structure] | None = None,
    over: Rows = ALL_ROWS,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One parameter after the other; K K^T is applied as K^T then K, so `products` stay unused.

    sizes, structures: of the axes of the only bucket, where the factors' shapes do not tell. over:
        whose rows its only member has, if there are more.
    """
    if skips(found_inf):
        return
    grads = unscaled(grads, grad_scale)
    buffers: Sequence[Tensor | None] = momentum_buffers or [None] * len(params)
    members = zip(params, grads, buffers, strict=True)
    first = 0
    for count in axes:
        last = first + count
        own = structures or structures_of(factors, joint_norms, first, last)
        for i in range(factors[first].shape[0]):
            param, grad, buffer = next(members)
            stored = [factor[i] for factor in factors[first:last]]
            kept = [residual[i] if residual.numel() else None for residual in residuals[first:last]]
            values = [
                factor.clone() if residual is None else matrix.join(factor, residual)
                for factor, residual in zip(stored, kept, strict=True)
            ]
            g = grad.reshape(sizes or known_sizes(param, factors[first:last]))
            if update_factors:
                momenta = [m[i].to(values[0].dtype) for m in factor_momenta[first:last]]
                matrix.update_factors_(
                    g,
                    values,
                    momenta,
                    factor_lr=factor_lr,
                    factor_momentum=factor_momentum,
                    damping=damping,
                    batch_size=batch_size,
                    structures=own,
                    over=over,
                )
                for value, factor, residual in zip(values, stored, kept, strict=True):
                    store(value, factor, residual)
                for value, m in zip(momenta, factor_momenta[first:last], strict=True):
                    m[i].copy_(value)
            update = matrix.precondition(-g if maximize else g, values, own)
            matrix.apply_(
                param,
                update.reshape(param.shape),
                buffer,
                lr=lr.double(),
                momentum=momentum,
                weight_decay=weight_decay,
                decoupled=decoupled,
                bound=math.inf if bound is None else bound,
            )
        first = last


def rootfree_shampoo_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    row_square_avgs: list[Tensor],
    grams: list[Tensor],
    factors: list[Tensor],
    residuals: list[Tensor],
    products: list[Tensor],
    steps: Tensor,
    lr: Tensor,
    *,
    refresh_products: bool,
    sizes: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **scalars: Any,
) -> None:
    """One parameter after the other; K K^T is applied as K^T then K, so `products` stay unused.

    sizes: as in `ifshampoo_`, whose `over` may be among the scalars.
    """
    if skips(found_inf):
        return
    rows: Sequence[Tensor | None] = row_square_avgs or [None] * len(params)
    members = zip(
        params, unscaled(grads, grad_scale), momentum_buffers, rows, steps.tolist(), strict=True
    )
    for first in range(0, len(factors), 2):
        pair = slice(first, first + 2)
        for i in range(factors[first].shape[0]):
            param, grad, buffer, row, step = next(members)
            stored = [factor[i] for factor in factors[pair]]
            kept = [residual[i] if residual.numel() else None for residual in residuals[pair]]
            axes = sizes or known_sizes(param, factors[pair])
            averages = [gram[i] for gram in grams[pair]]
            wide = torch.promote_types(buffer.dtype, averages[0].dtype)
            roots = [
                (factor.clone() if residual is None else matrix.join(factor, residual)).to(wide)
                for factor, residual in zip(stored, kept, strict=True)
            ]
            momentum = buffer.reshape(axes).to(wide, copy=True)
            widened = [s.to(wide) for s in averages]
            rootfree_shampoo.rootfree_shampoo_(
                param,
                grad.reshape(axes),
                momentum,
                widened,
                roots,
                row,
                step,
                lr=lr.double(),
                **scalars,
            )
            buffer.copy_(momentum.view(buffer.shape))
            for average, new in zip(averages, widened, strict=True):
                average.copy_(new)
            for root, factor, residual in zip(roots, stored, kept, strict=True):
                store(root, factor, residual)


def store(value: Tensor, factor: Tensor, residual: Tensor | None) -> None:
    """A factor in its dtype, in two parts where it has a residual."""
    if residual is None:
        factor.copy_(value)
    else:
        high, low = matrix.split(value.float())
        factor.copy_(high)
        residual.copy_(low)


def take_bucket(bucket: int, tensors: IFShampooTensors, axes: list[int]) -> IFShampooTensors:
    """The tensors of one bucket out of those of a call."""
    starts = [sum(axes[:i]) for i in range(bucket + 1)]
    sizes = [tensors.factors[start].shape[0] for start in starts]
    here = slice(starts[-1], starts[-1] + axes[bucket])
    members = slice(sum(sizes[:-1]), sum(sizes))
    return tensors._replace(
        params=tensors.params[members],
        grads=tensors.grads[members],
        factors=tensors.factors[here],
        residuals=tensors.residuals[here],
        momenta=tensors.momenta[here],
        products=tensors.products[here],
        buffers=tensors.buffers[members],
    )


def take_pair(bucket: int, tensors: RootFreeShampooTensors) -> RootFreeShampooTensors:
    """The tensors of one bucket out of those of a call."""
    pair = slice(2 * bucket, 2 * bucket + 2)
    first = sum(factor.shape[0] for factor in tensors.factors[: pair.start : 2])
    here = slice(first, first + tensors.factors[pair.start].shape[0])
    return tensors._replace(
        params=tensors.params[here],
        grads=tensors.grads[here],
        buffers=tensors.buffers[here],
        rows=tensors.rows[here],
        grams=tensors.grams[pair],
        factors=tensors.factors[pair],
        residuals=tensors.residuals[pair],
        products=tensors.products[pair],
        steps=tensors.steps[here],
    )
