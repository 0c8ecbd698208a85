"""What the diagonal methods are in Triton: the update of a chunk, and the scalars that it reads.

rootfree_fused/reference/diag.py has the equations, and those of vectors rootfree_shampoo.py.
Dtypes: all registers are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import decayed, descend, sign_of
from .slots import (
    ADAMW,
    RMSPROP,
    SIGN,
    VECTOR_ADAM,
    AdamWScalars,
    RMSpropScalars,
    SignScalars,
    VectorAdamScalars,
)

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# The roots of the largest square and of the smallest one that has all its bits.
_LARGEST_GRADIENT = tl.constexpr((1 - 1e-6) * torch.finfo(torch.float32).max ** 0.5)
_SMALLEST_ROOT = tl.constexpr((1 - 1e-6) * torch.finfo(torch.float32).tiny ** 0.5)


@triton.jit
def _rmsprop_update(p, g, parts, s, buf, lr, scalars_ptr, step_ptr):
    sign = tl.load(scalars_ptr + RMSPROP.sign)
    batch_size = tl.load(scalars_ptr + RMSPROP.batch_size)
    damping = tl.load(scalars_ptr + RMSPROP.damping)
    decoupled = tl.load(scalars_ptr + RMSPROP.decoupled)
    coupled = tl.load(scalars_ptr + RMSPROP.coupled)
    alpha = tl.load(scalars_ptr + RMSPROP.alpha)
    one_minus_alpha = tl.load(scalars_ptr + RMSPROP.one_minus_alpha)

    g *= sign
    target = _bounded(batch_size * g * g)
    if parts is not None:
        square_weight = tl.load(scalars_ptr + RMSPROP.square_weight)
        signal_weight = tl.load(scalars_ptr + RMSPROP.signal_weight)
        floor_weight = tl.load(scalars_ptr + RMSPROP.floor_weight)
        parts = _bounded(batch_size * parts)
        target = _second_moment(target, parts, square_weight, signal_weight, floor_weight)
    s = decayed(s, target, alpha, one_minus_alpha)
    momentum_ptr = scalars_ptr + RMSPROP.momentum
    p, buf = descend(p, g / (s + damping), buf, lr, coupled, decoupled, momentum_ptr)
    return p, s, buf


@triton.jit
def _adamw_update(p, g, parts, m, s, lr, scalars_ptr, step_ptr):
    sign = tl.load(scalars_ptr + ADAMW.sign)
    batch_size = tl.load(scalars_ptr + ADAMW.batch_size)
    damping = tl.load(scalars_ptr + ADAMW.damping)
    weight_decay = tl.load(scalars_ptr + ADAMW.weight_decay)
    beta1 = tl.load(scalars_ptr + ADAMW.beta1)
    one_minus_beta1 = tl.load(scalars_ptr + ADAMW.one_minus_beta1)
    beta2 = tl.load(scalars_ptr + ADAMW.beta2)
    one_minus_beta2 = tl.load(scalars_ptr + ADAMW.one_minus_beta2)

    g *= sign
    p -= lr * weight_decay * p
    # By halves where g - m of finite g is beyond the largest number.
    beyond = (tl.abs(g - m) > _LARGEST) & (tl.abs(g) <= _LARGEST)
    scale = tl.where(beyond, 0.5, 1.0)
    m = decayed(scale * m, scale * g, beta1, one_minus_beta1) * tl.where(beyond, 2.0, 1.0)
    target = _bounded(batch_size * g * g)
    if parts is not None:
        square_weight = tl.load(scalars_ptr + ADAMW.square_weight)
        signal_weight = tl.load(scalars_ptr + ADAMW.signal_weight)
        floor_weight = tl.load(scalars_ptr + ADAMW.floor_weight)
        parts = _bounded(batch_size * parts)
        target = _second_moment(target, parts, square_weight, signal_weight, floor_weight)
    s = decayed(s, target, beta2, one_minus_beta2)
    denominator = s + damping
    if step_ptr is not None:
        step = tl.load(step_ptr)
        lr /= _bias_correction(tl.load(scalars_ptr + ADAMW.log_beta1), step)
        correction = _bias_correction(tl.load(scalars_ptr + ADAMW.log_beta2), step)
        denominator = s / correction + damping
    return p - lr * (m / denominator), m, s


@triton.jit
def _sign_update(p, g, parts, m, unused, lr, scalars_ptr, step_ptr):
    sign = tl.load(scalars_ptr + SIGN.sign)
    sign_last = tl.load(scalars_ptr + SIGN.sign_last) != 0
    beta = tl.load(scalars_ptr + SIGN.beta)
    one_minus_beta = tl.load(scalars_ptr + SIGN.one_minus_beta)
    if parts is not None:
        target = sign * tl.load(scalars_ptr + SIGN.part_weight) * parts
    else:
        g *= sign
        target = tl.where(sign_last, g, sign_of(g))
    p -= lr * tl.load(scalars_ptr + SIGN.weight_decay) * p
    m = decayed(m, target, beta, one_minus_beta)
    return p - lr * tl.where(sign_last, sign_of(m), m), m


@triton.jit
def _vector_adam_update(p, g, parts, m, v, lr, scalars_ptr, step_ptr):
    beta1 = tl.load(scalars_ptr + VECTOR_ADAM.beta1)
    one_minus_beta1 = tl.load(scalars_ptr + VECTOR_ADAM.one_minus_beta1)
    beta2 = tl.load(scalars_ptr + VECTOR_ADAM.beta2)
    one_minus_beta2 = tl.load(scalars_ptr + VECTOR_ADAM.one_minus_beta2)
    step = tl.load(step_ptr)

    g *= tl.load(scalars_ptr + VECTOR_ADAM.sign)
    bounded = tl.minimum(tl.maximum(g, -_LARGEST_GRADIENT), _LARGEST_GRADIENT)
    g = tl.where(tl.abs(g) <= _LARGEST, bounded, g)
    m = decayed(m, g, beta1, one_minus_beta1)
    ahead = decayed(m, g, beta1, one_minus_beta1)
    v = decayed(v, g * g, beta2, one_minus_beta2)
    correction = _bias_correction(tl.load(scalars_ptr + VECTOR_ADAM.log_beta2), step)
    root = tl.maximum(tl.sqrt(v / correction), _SMALLEST_ROOT, propagate_nan=tl.PropagateNan.ALL)
    ahead /= _bias_correction(tl.load(scalars_ptr + VECTOR_ADAM.log_beta1), step + 1.0)
    p -= lr * tl.load(scalars_ptr + VECTOR_ADAM.weight_decay) * p
    return p - lr * tl.load(scalars_ptr + VECTOR_ADAM.update_rms) * (ahead / root), m, v


@triton.jit
def _bounded(square):
    # At most the largest finite number: an infinite s would be NaN at the next step.
    return tl.minimum(square, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _second_moment(whole, parts, square_weight, signal_weight, floor_weight):
    """What s follows, of B g^2 and b q; see reference.second_moment."""
    target = square_weight * parts + signal_weight * (whole - parts)
    floor = floor_weight * whole
    return _bounded(tl.maximum(target, floor, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _bias_correction(log_decay, step):
    # 1 - e^-y to 2 ulp; below y = 1 its Taylor series, which does not cancel. Float64 would be
    # shorter, but some chips have so little of it that it, not memory, would bound the kernel.
    y = -log_decay * step
    series = 1.0
    for n in tl.static_range(10, 1, -1):
        series = 1.0 - y * (1.0 / n) * series
    return tl.where(y < 1.0, y * series, 1.0 - tl.exp(-y))


def _rmsprop_scalars(
    lr: float,
    *,
    alpha: float,
    damping: float,
    weight_decay: float,
    momentum: float,
    batch_size: float | Tensor,
    decoupled: bool,
    maximize: bool,
    square_weight: float = 1.0,
    signal_weight: float = 1.0,
    floor_weight: float = 1.0,
) -> RMSpropScalars:
    return RMSpropScalars(
        lr=lr,
        sign=-1.0 if maximize else 1.0,
        batch_size=float(batch_size),
        damping=damping,
        decoupled=weight_decay if decoupled else 0.0,
        coupled=0.0 if decoupled else weight_decay,
        alpha=alpha,
        one_minus_alpha=1 - alpha,
        momentum=momentum,
        square_weight=square_weight,
        signal_weight=signal_weight,
        floor_weight=floor_weight,
    )


def _adamw_scalars(
    lr: float,
    *,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    batch_size: float | Tensor,
    maximize: bool,
    square_weight: float = 1.0,
    signal_weight: float = 1.0,
    floor_weight: float = 1.0,
) -> AdamWScalars:
    return AdamWScalars(
        lr=lr,
        sign=-1.0 if maximize else 1.0,
        batch_size=float(batch_size),
        damping=damping,
        weight_decay=weight_decay,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
        log_beta2=math.log(beta2) if beta2 > 0 else -math.inf,
        square_weight=square_weight,
        signal_weight=signal_weight,
        floor_weight=floor_weight,
    )


def _sign_scalars(
    lr: float,
    *,
    beta: float,
    weight_decay: float,
    batch_size: float | Tensor,
    sign_last: bool,
    maximize: bool,
    part_weight: float = 1.0,
) -> SignScalars:
    return SignScalars(
        lr=lr,
        sign=-1.0 if maximize else 1.0,
        weight_decay=weight_decay,
        beta=beta,
        one_minus_beta=1 - beta,
        sign_last=float(sign_last),
        part_weight=part_weight,
    )


def _vector_adam_scalars(
    lr: float,
    *,
    beta1: float,
    vector_beta2: float,
    weight_decay: float,
    vector_rms: float,
    batch_size: float | Tensor,
    maximize: bool,
) -> VectorAdamScalars:
    return VectorAdamScalars(
        lr=lr,
        sign=-1.0 if maximize else 1.0,
        weight_decay=weight_decay,
        update_rms=vector_rms,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=vector_beta2,
        one_minus_beta2=1 - vector_beta2,
        log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
        log_beta2=math.log(vector_beta2) if vector_beta2 > 0 else -math.inf,
    )


class Body(NamedTuple):
    """The Triton body of a diagonal method: all that it adds to the launch.

    update: jit function of p, g, the parts of micro-batches or None, the first state, the second or
        None (registers), lr, scalars_ptr and step_ptr, or None without steps; returns p and the
        states, in the schema's order, but no None, which Triton 3.6 cannot return.
    scalars: lr and the operator's settings to the row of `slots` that `update` reads.
    counts: whether the operator has step counts.
    signs: whether its parts of micro-batches are signs, on which a gradient scaler leaves no trace.
    """

    update: Any
    scalars: Callable[..., tuple[float, ...]]
    counts: bool
    signs: bool = False


# By operator. A new method is its update, its row of scalars in slots.py and its entry here.
BODIES = {
    "rmsprop_": Body(_rmsprop_update, _rmsprop_scalars, counts=False),
    "adamw_": Body(_adamw_update, _adamw_scalars, counts=True),
    "sign_": Body(_sign_update, _sign_scalars, counts=False, signs=True),
    "vector_adam_": Body(_vector_adam_update, _vector_adam_scalars, counts=True),
}
