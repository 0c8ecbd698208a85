"""The fused updates as functions on lists of tensors.

PyTorch's dispatcher chooses the body: C++ on the CPU (csrc/), Triton on CUDA (kernels/), and the
specification (reference/) on every other device and wherever one of the two is missing.
`backends()` says what runs on each device.
"""

from .diagonal import SecondMoment, WeightDecayMode, accumulate_, adamw_, rmsprop_
from .dispatch import backends
from .matrix import ifshampoo_
from .rootfree_shampoo import rootfree_shampoo_

__all__ = [
    "SecondMoment",
    "WeightDecayMode",
    "accumulate_",
    "adamw_",
    "backends",
    "ifshampoo_",
    "rmsprop_",
    "rootfree_shampoo_",
]
