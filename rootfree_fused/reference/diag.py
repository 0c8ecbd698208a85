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
) -> None:
    """One root-free RMSProp step on one parameter; square_avg (s) starts at 1 as released.

        s   <- s + (1 - alpha) (B g^2 - s)
        u    = g / (s + damping)
        u   <- u + weight_decay p            unless decoupled
        p   <- p - lr weight_decay p         if decoupled
        buf <- momentum buf + u              (buf = u where there is no momentum buffer)
        p   <- p - lr buf

    With alpha = 1 and damping = 0 this is torch.optim.SGD(momentum=momentum); unless decoupled,
    with SGD's own weight_decay.
    """
    g, p = _operands(param, grad, square_avg, maximize)

    square_avg.lerp_(_square(g, batch_size), 1 - alpha)
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
) -> None:
    """One root-free AdamW step on one parameter; exp_avg_sq (s) starts at 1 as released.

        p <- p - lr weight_decay p
        m <- m + (1 - beta1) (g - m)
        s <- s + (1 - beta2) (B g^2 - s)
        p <- p - (lr / bc1) m / (s / bc2 + damping)

    bc1 = 1 - beta1^t and bc2 = 1 - beta2^t, where t = `step` counts this step; without `step` there
    is no bias correction: bc1 = bc2 = 1.
    """
    g, p = _operands(param, grad, exp_avg_sq, maximize)
    bias_correction1 = bias_correction(beta1, step)
    bias_correction2 = bias_correction(beta2, step)

    p = p - lr * weight_decay * p
    exp_avg.copy_(_average(exp_avg, g, 1 - beta1))
    exp_avg_sq.lerp_(_square(g, batch_size), 1 - beta2)
    denominator = exp_avg_sq / bias_correction2 + damping
    param.copy_(p - (lr / bias_correction1) * exp_avg / denominator)


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
