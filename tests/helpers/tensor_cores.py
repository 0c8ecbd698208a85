"""Products of float32 as the kernels make them on tensor cores, in plain torch on any device.

Triton's "tf32x3" splits both operands into a TF32 number and the rest, multiplies high by high, low
by high and high by low, and adds that block of the sum to the others. A tensor core adds eight
terms at a time to its accumulator and cuts the sum off to float32 (on Hopper but for two bits,
which it also keeps of each term: Khattak and Mikaitis, arXiv 2512.07004), where IEEE arithmetic
rounds to nearest: that is most of the error.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

F32 = torch.float32
DEPTH = 32  # of a block of the kernels' sums
TERMS = 8  # of one instruction in TF32


def split_tf32(value):
    """High and low parts of 11 bits each: rounded to nearest, ties away; the rest, cut off."""
    value = value.contiguous()
    high = ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(F32)
    return high, ((value - high).view(torch.int32) & ~0x1FFF).view(F32)


def product(a, b):
    """a @ b of float32 (..., m, k) and (..., k, n), in three TF32 products a block of the sum."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for columns, rows in zip(a.split(DEPTH, -1), b.split(DEPTH, -2), strict=True):
        (high, low), (other_high, other_low) = split_tf32(columns), split_tf32(rows)
        block = _accumulated(torch.zeros_like(total), low, other_high)
        block = _accumulated(block, high, other_low)
        block = block.masked_fill(block.isnan(), 0)  # of an infinity's low part
        total = total + _accumulated(block, high, other_high)
    return total


def _accumulated(total, a, b):
    """total + a @ b, cut off to float32 after every few terms."""
    for columns, rows in zip(a.split(TERMS, -1), b.split(TERMS, -2), strict=True):
        exact = total.double() + columns.double() @ rows.double()
        total = exact.float()
        beyond = total.double().abs() > exact.abs()
        total = torch.where(beyond, torch.nextafter(total, torch.zeros_like(total)), total)
    return total


class ThreeTF32Products(TorchDispatchMode):
    """Every float32 product within is `product`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        multiplies = packet in (torch.ops.aten.mm, torch.ops.aten.bmm)
        if multiplies and args[0].dtype == F32:
            return product(*args)
        return func(*args, **(kwargs or {}))


def float32_products(device):
    """Products as that device's kernels make them."""
    return ThreeTF32Products() if torch.device(device).type == "cuda" else nullcontext()
