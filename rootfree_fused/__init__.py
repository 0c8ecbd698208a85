"""Fused optimizers that precondition without a square root."""

from .batch_size import BatchSizeCounter
from .capture import CapturedStep
from .diag import RootFreeAdamW, RootFreeRMSprop, Sign
from .grouping import param_groups
from .lowbit import to_bfloat16_, to_float32_
from .matrix import IFShampoo
from .rescale import rescale_
from .shampoo import RootFreeShampoo

__all__ = [
    "BatchSizeCounter",
    "CapturedStep",
    "IFShampoo",
    "RootFreeAdamW",
    "RootFreeRMSprop",
    "RootFreeShampoo",
    "Sign",
    "param_groups",
    "rescale_",
    "to_bfloat16_",
    "to_float32_",
]
__version__ = "0.1.0"
