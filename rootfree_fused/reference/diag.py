"""Root-free diagonal updates, one parameter at a time: the specification.

Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024
(arXiv 2402.03496), Fig. 4 and Fig. 7, and the authors' released code. The released code stores
v = s / B; here s itself is stored, so that a batch size that changes between steps stays right.

Every function works in place and computes in the dtype of the state: float64 state makes it exact
to about 1e-15, and a bfloat16 parameter with float32 state is rounded once, at the write. The
gradient is never written. B g^2 beyond the largest finite number counts as that number: s would
become infinite, and NaN at the next step.
"""

from __future__ import annotations

import math
from collections import namedtuple

import torch
from torch import Tensor


def mean_square(grad: Tensor, batch_size: float) -> Tensor:
    """The mean of B g^2 over a tensor: where s starts when its scale is that of its first gradient.

    The first step then has the scale 1 / (B g) whatever the loss and however many terms it
    averages; from s = 1 it is g, and s falls to B g^2 by alpha^t alone.
    """
    exact = torch.float32 if grad.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=exact)
    return norm.square() * (batch_size / max(grad.numel(), 1))


def rmsprop_(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float | Tensor,
    alpha: float,
    damping: float,
    weight_decay: float,
    momentum: float,
    batch_size: float,
    decoupled: bool,
    maximize: bool,
    parts: Tensor | None = None,
    square_weight: float = 1.0,
    signal_weight: float = 1.0,
    floor_weight: float = 0.0,
) -> None:
    """One root-free RMSProp step on one parameter; square_avg (s) starts at 1 as released.

        s   <- s + (1 - alpha) (B g^2 - s)       or what `second_moment` gives for B g^2
        u    = g / (s + damping)
        u   <- u + weight_decay p            unless decoupled
        p   <- p - lr weight_decay p         if decoupled
        buf <- momentum buf + u              (buf = u where there is no momentum buffer)
        p   <- p - lr buf

    With alpha = 1 and damping = 0 this is torch.optim.SGD(momentum=momentum); unless decoupled,
    with SGD's own weight_decay. parts: the mean square of micro-batches, see `second_moment`.
    """
    g, p = _operands(param, grad, square_avg, maximize)
    weights = SquareWeights(square_weight, signal_weight, floor_weight)

    square_avg.lerp_(second_moment(g, parts, weights, batch_size), 1 - alpha)
    u = g / (square_avg + damping)
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        u = u + weight_decay * p
    if momentum_buffer is not None:
        u = momentum_buffer.mul_(momentum).add_(u)
    param.copy_(p - lr * u)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    batch_size: float,
    maximize: bool,
    parts: Tensor | None = None,
    square_weight: float = 1.0,
    signal_weight: float = 1.0,
    floor_weight: float = 0.0,
) -> None:
    """One root-free AdamW step on one parameter; exp_avg_sq (s) starts at 1 as released.

        p <- p - lr weight_decay p
        m <- m + (1 - beta1) (g - m)
        s <- s + (1 - beta2) (B g^2 - s)         or what `second_moment` gives for B g^2
        p <- p - (lr / bc1) m / (s / bc2 + damping)

    bc1 = 1 - beta1^t and bc2 = 1 - beta2^t, where t = `step` counts this step; without `step` there
    is no bias correction: bc1 = bc2 = 1. parts: the mean square of micro-batches, see
    `second_moment`.
    """
    g, p = _operands(param, grad, exp_avg_sq, maximize)
    weights = SquareWeights(square_weight, signal_weight, floor_weight)
    bias_correction1 = bias_correction(beta1, step)
    bias_correction2 = bias_correction(beta2, step)

    p = p - lr * weight_decay * p
    exp_avg.copy_(_average(exp_avg, g, 1 - beta1))
    exp_avg_sq.lerp_(second_moment(g, parts, weights, batch_size), 1 - beta2)
    denominator = exp_avg_sq / bias_correction2 + damping
    param.copy_(p - (lr / bias_correction1) * exp_avg / denominator)


def sign_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
    sign_last: bool,
    maximize: bool,
    parts: Tensor | None = None,
    part_weight: float = 1.0,
) -> None:
    """One step of sign descent on one parameter; exp_avg (m) starts at 0.

        p <- p - lr weight_decay p
        m <- m + (1 - beta) (y - m)
        p <- p - lr sign(m)                      if the sign comes last, with y = g; else lr m

    where y is sign(g) without `parts`, and with them the mean of micro-batches' signs,
    part_weight times their sum. sign(0) = 0.
    """
    g, p = _operands(param, grad, exp_avg, maximize)
    if parts is not None:
        y = (-part_weight if maximize else part_weight) * parts.to(exp_avg.dtype)
    else:
        y = g if sign_last else _sign(g)

    p = p - lr * weight_decay * p
    exp_avg.lerp_(y, 1 - beta)
    param.copy_(p - lr * (_sign(exp_avg) if sign_last else exp_avg))


class SquareWeights(namedtuple("SquareWeights", ("square", "signal", "floor"))):
    """How what s follows is made of b q and B g^2; see `second_moment`."""

    __slots__ = ()


def square_weights(kind: str, parts: int) -> SquareWeights:
    """Those of k = `parts` micro-batches, of which `second_moment` makes with b q and B g^2

        "batch"     B g^2
        "micro"     b q
        "variance"  b (q - g^2) k / (k - 1)
        "mean"      max(B (k g^2 - q) / (k - 1), B g^2 / k)

    Where a term of the loss has the gradient mu and the variance v their expectations are
    B mu^2 + v, b mu^2 + v, v, and, before the max, B mu^2. "variance" and "mean" need two parts.

    The idea is of Roulet and Agarwala, "Per-example gradients: a new frontier for understanding and
    improving optimizers", arXiv 2510.00236, whose own formulas these are not.
    """
    if kind == "batch":
        return SquareWeights(1.0, 1.0, 0.0)
    if kind == "micro":
        return SquareWeights(1.0, 0.0, 0.0)
    if kind == "variance":
        return SquareWeights(1.0, -1 / (parts - 1), 0.0)
    return SquareWeights(0.0, parts / (parts - 1), 1 / parts)


def second_moment(
    mean: Tensor, square: Tensor | None, weights: SquareWeights, batch_size: float
) -> Tensor:
    """What s follows, of the mean gradient g and the squares of micro-batches; B g^2 without them.

        max(w_square b q + w_signal (B g^2 - b q), w_floor B g^2)

    square: b q / B, where q is the mean over k micro-batches of b = B / k terms of their squared
        gradients: sum_j w_j^2 g_j^2 / (sum_j w_j)^2, with w_j = 1 or their terms.
    """
    own = _square(mean, batch_size)
    if square is None:
        return own
    largest = torch.finfo(own.dtype).max
    parts = (batch_size * square.to(own.dtype)).clamp_max(largest)
    target = weights.square * parts + weights.signal * (own - parts)
    return torch.maximum(target, weights.floor * own).clamp_max(largest)


def accumulate_(
    total: Tensor, part: Tensor | None, grad: Tensor, *, weight: float, signs: bool, first: bool
) -> None:
    """Add a micro-batch's gradient to a sum, and its square or its sign to another.

        total <- total + w g
        part  <- part + (w g)^2, or part + w sign(g)

    Both start at 0 with the first.
    """
    g = weight * grad.to(total.dtype)
    total.copy_(g if first else total + g)
    if part is not None:
        own = weight * _sign(g) if signs else g * g
        part.copy_(own if first else part + own)


def _sign(x: Tensor) -> Tensor:
    """As torch.sign, but NaN stays."""
    return torch.where(x.isnan(), x, x.sign())


def _operands(param: Tensor, grad: Tensor, state: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    """The ascent-corrected gradient and the parameter, both in the dtype of the state."""
    g = grad.to(state.dtype)
    return (-g if maximize else g), param.to(state.dtype)


def _average(m: Tensor, g: Tensor, weight: float) -> Tensor:
    """As lerp, by halves where g - m of finite g is beyond the largest number."""
    beyond = (g - m).isinf() & g.isfinite()
    return torch.where(beyond, 2 * torch.lerp(m / 2, g / 2, weight), torch.lerp(m, g, weight))


def _square(g: Tensor, batch_size: float) -> Tensor:
    return (batch_size * g * g).clamp_max(torch.finfo(g.dtype).max)


def bias_correction(beta: float, step: float | Tensor | None) -> float | Tensor:
    """1 - beta^step, in float64 and without cancellation."""
    if step is None:
        return 1.0
    if beta == 0.0:
        return 1.0
    if isinstance(step, Tensor):
        return -torch.expm1(step.double() * math.log(beta))
    return -math.expm1(step * math.log(beta))
