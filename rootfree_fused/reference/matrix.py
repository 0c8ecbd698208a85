"""Inverse-free, root-free Shampoo (IF-Shampoo) on one parameter: the specification.

Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024
(arXiv 2402.03496), Fig. 3, and the released code, whose N-dimensional form this is. The released
codes also divide K by sqrt(d) and by max(1, sqrt(max |K|)) and multiply back; that protects float16
alone and is left out.

The gradient has N axes of sizes d_1 .. d_N, none of size 1 unless N = 1, and a factor K_n an axis:
of one of the structures of `structures` and `compact_structures`, which `structure_of` tells from
its tensor unless it is given. Factors start at the identity as released, or at `initial_scale`
times it, and their momenta m_n at zero. Everything is computed in the dtype of the factors.

Two limits, the same in every dtype, keep products and norms finite in float32: finite entries of G
beyond 2^40 count as 2^40, entries of m_n beyond 2^48 as 2^48, with their signs. G or m_n of such a
size is a million times what training is known to survive. Infinities and NaN in G stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import ALL_ROWS, Rows
from .structures import Structure, structure_of

LARGEST_GRADIENT = 2.0**40
LARGEST_MOMENTUM = 2.0**48


def initial_scale(square: Tensor, damping: float, axes: int) -> Tensor:
    """c such that factors c I precondition G to P = G / (square + damping).

    With square the mean of B g^2 (`mean_square`), every H_n of such factors has the trace 0: they
    have the scale at which the factors' update comes to rest.
    """
    return (square + damping).pow(-1 / (2 * axes))


def update_factors_(
    grad: Tensor,
    factors: Sequence[Tensor],
    factor_momenta: Sequence[Tensor],
    *,
    factor_lr: float,
    factor_momentum: float,
    damping: float,
    batch_size: float,
    structures: Sequence[Structure] | None = None,
    over: Rows = ALL_ROWS,
) -> None:
    """One update of every factor, all from the old factors.

        M_n  = the mode-n unfolding of G x_1 K_1^T ... x_N K_N^T
        H_n  = 1/2 { B / prod_{j!=n} d_j  M_n M_n^T
                     + damping prod_{j!=n} (tr(K_j^T K_j) / d_j) K_n^T K_n  -  I }
        m_n <- factor_momentum m_n + (1 - factor_momentum) H_n
        K_n <- K_n - factor_lr / max(1, ||m_n||_F) K_n m_n

    A factor that is not dense keeps of H_n what its structure holds of it. Where G is exactly zero
    nothing changes: it says nothing, and without it the factors would grow to 1 / damping.

    over: whose rows the first axis of G has, if there are more; its factor is diagonal then.
    """
    structures = structures or list(map(structure_of, factors))
    sizes = over.count(grad), *grad.shape[1:]
    axes = list(zip(structures, factors, factor_momenta, sizes, strict=True))
    learns = over.learns(grad).to(factors[0].dtype)
    transformed = limited(grad).to(factors[0].dtype)
    for axis, (structure, factor, *_) in enumerate(axes):
        transformed = _mode_product(transformed, structure, factor, axis, transposed=True)
    grams = [s.gram(_unfolded(transformed, axis)) for axis, (s, *_) in enumerate(axes)]
    square_sums = [structure.square_sum(factor) for structure, factor, *_ in axes]

    def learn_(axis: int) -> Tensor:
        """Average H of an axis into its momentum, and the square of the norm of that."""
        structure, factor, momentum, size = axes[axis]
        others = math.prod(sizes) // size
        trace = math.prod(
            total / d
            for j, (total, d) in enumerate(zip(square_sums, sizes, strict=True))
            if j != axis
        )
        target = batch_size / others * grams[axis] + damping * trace * structure.square(factor)
        structure.add_identity_(target, -1, size)
        momentum.lerp_(target / 2, (1 - factor_momentum) * learns)
        momentum.clamp_(-LARGEST_MOMENTUM, LARGEST_MOMENTUM)
        return structure.norm_squares(momentum)

    # The first axis needs no sum over rows, and so all such sums are taken at once.
    square_sums[0], square, *grams[1:] = over.total(square_sums[0], learn_(0), *grams[1:])
    squares = [square, *map(learn_, range(1, len(axes)))]
    for (structure, factor, momentum, _), square in zip(axes, squares, strict=True):
        step = learns * factor_lr / square.sqrt().clamp_min(1)
        factor.sub_(step * structure.product(factor, momentum))


def precondition(
    grad: Tensor, factors: Sequence[Tensor], structures: Sequence[Structure] | None = None
) -> Tensor:
    """P = G x_1 (K_1 K_1^T) ... x_N (K_N K_N^T), with the newest factors."""
    result = limited(grad).to(factors[0].dtype)
    structures = structures or list(map(structure_of, factors))
    for axis, (structure, factor) in enumerate(zip(structures, factors, strict=True)):
        for transposed in (True, False):
            result = _mode_product(result, structure, factor, axis, transposed=transposed)
    return result


def limited(grad: Tensor) -> Tensor:
    """G with its finite entries within LARGEST_GRADIENT."""
    limit = min(LARGEST_GRADIENT, torch.finfo(grad.dtype).max)
    return torch.where(grad.isinf(), grad, grad.clamp(-limit, limit))


def apply_(
    param: Tensor,
    update: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    bound: float = math.inf,
) -> None:
    """One step of a parameter along its preconditioned gradient P = `update`.

        P   <- min(max(P, -bound), bound)    every entry; as released there is no bound
        u    = P + weight_decay p            (P where decoupled)
        p   <- p - lr weight_decay p         if decoupled
        buf <- momentum buf + u              (buf = u where there is no momentum buffer)
        p   <- p - lr buf

    Computed in float32, or float64 for float64 parameters.
    """
    dtype = torch.promote_types(param.dtype, torch.float32)
    p, u = param.to(dtype), update.to(dtype).clamp(-bound, bound)
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        u = u + weight_decay * p
    if momentum_buffer is not None:
        u = momentum_buffer.mul_(momentum).add_(u)
    param.copy_(p - lr * u)


def largest_update(max_update: float | None, batch_size: float, damping: float) -> float | None:
    """The bound of the entries of P: max_update / sqrt(B damping), or None for none.

    Near 1 / sqrt(B damping) those of a root-free diagonal step g / (B g^2 + damping) stay by
    themselves.
    """
    return None if max_update is None else max_update / (batch_size**0.5 * damping**0.5)


def is_update_step(step: int, interval: int, schedule: str) -> bool:
    """Whether factors are updated at `step`, counted from 0.

    "constant": every `interval` steps. "log4", as released: after an update at step k wait
    min(max(floor(log4(k + 1)), 1), interval) steps.
    """
    if schedule == "constant":
        return step % interval == 0
    start = 0  # the first update that is followed by this wait
    for wait in range(1, interval + 1):
        end = 4 ** (wait + 1) - 1  # the first step whose wait is longer
        if wait == interval or step < end:
            return step >= start and (step - start) % wait == 0
        start += -(-(end - start) // wait) * wait
    raise ValueError(f"interval is {interval}; pass a whole number >= 1")


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as a bfloat16 tensor, rounded to nearest, and the 16 bits that remain.

    The residual is the int16 difference of the two bit patterns, so that `join` gives back every
    bit. Ties round away from zero: rounded to even, a difference of +2^15 would not fit.
    """
    # A NaN of all ones would carry into the sign.
    bits = value.view(torch.int32).masked_fill(value.isnan(), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, residual: Tensor) -> Tensor:
    """The float32 tensor that `split` took apart."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)


def _mode_product(
    tensor: Tensor, structure: Structure, factor: Tensor, axis: int, *, transposed: bool
) -> Tensor:
    """tensor x_axis F for F = factor or its transpose: F times every fibre along the axis."""
    applied = structure.left(factor, _unfolded(tensor, axis), transposed=transposed)
    return applied.reshape(tensor.movedim(axis, 0).shape).movedim(0, axis)


def _unfolded(tensor: Tensor, axis: int) -> Tensor:
    """The fibres along an axis as the columns of a matrix."""
    fibres = tensor.movedim(axis, 0)
    return fibres.flatten(1) if fibres.dim() > 1 else fibres[:, None]
