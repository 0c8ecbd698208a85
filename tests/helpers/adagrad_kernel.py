"""The Triton body of root-free Adagrad: its scalars, its update, its entry."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rootfree_fused.kernels.diag_bodies import Body
from rootfree_fused.kernels.slots import columns


class AdagradScalars(NamedTuple):
    lr: float
    sign: float
    batch_size: float
    damping: float
    weight_decay: float


ADAGRAD = columns(AdagradScalars)


@triton.jit
def update(p, g, parts, s, unused, lr, scalars_ptr, step_ptr):
    g *= tl.load(scalars_ptr + ADAGRAD.sign)
    s += tl.load(scalars_ptr + ADAGRAD.batch_size) * g * g
    p -= lr * tl.load(scalars_ptr + ADAGRAD.weight_decay) * p
    return p - lr * (g / (s + tl.load(scalars_ptr + ADAGRAD.damping))), s


def scalars(lr, *, damping, weight_decay, batch_size, maximize):
    return AdagradScalars(lr, -1.0 if maximize else 1.0, float(batch_size), damping, weight_decay)


BODY = Body(update, scalars, counts=False)
