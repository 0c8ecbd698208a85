"""What kernels of several files compute a number at a time, and read of a gradient scaler."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decayed(average, value, decay, one_minus_decay):
    """The average after a step: decay average + (1 - decay) value."""
    # As torch.lerp does it: one formula for all decays would be inexact near 0 or drift near 1.
    change = value - average
    return tl.where(decay > 0.5, average + one_minus_decay * change, value - decay * change)


@triton.jit
def descend(p, u, buf, lr, coupled, decoupled, momentum_ptr):
    """The parameter and the momentum buffer, or None without one, after a step along u.

    u <- u + coupled p; p <- p - lr decoupled p; buf <- momentum buf + u; p <- p - lr buf
    """
    u += coupled * p
    p -= lr * decoupled * p
    if buf is not None:
        u += tl.load(momentum_ptr) * buf
    return p - lr * u, u


@triton.jit
def sign_of(x):
    """-1, 0 or 1; NaN stays."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def skips(found_inf_ptr):
    """Whether a gradient scaler found infs; always false without one."""
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    return skip


@triton.jit
def inverse_of(grad_scale_ptr):
    """What undoes a gradient scaler's scale; None without one."""
    inverse = None
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr).to(tl.float32)
    return inverse
