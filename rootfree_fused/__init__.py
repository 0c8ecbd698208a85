"""Fused optimizers that precondition without a square root."""

from .batch_size import BatchSizeCounter
from .capture import CapturedStep
from .diag import RootFreeAdamW, RootFreeRMSprop
from .matrix import IFShampoo

__all__ = ["BatchSizeCounter", "CapturedStep", "IFShampoo", "RootFreeAdamW", "RootFreeRMSprop"]
__version__ = "0.1.0"
