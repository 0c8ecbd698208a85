"""What kernels of several files compute a number at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def skips(found_inf_ptr):
    """Whether a gradient scaler found infs; always false without one."""
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    return skip


@triton.jit
def decayed(average, value, decay, one_minus_decay):
    # As torch.lerp does it: one formula for all decays would be inexact near 0 or drift near 1.
    change = value - average
    return tl.where(decay > 0.5, average + one_minus_decay * change, value - decay * change)
