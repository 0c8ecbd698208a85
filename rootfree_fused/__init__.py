"""Fused optimizers that precondition without a square root."""

from .diag import RootFreeAdamW, RootFreeRMSprop
from .matrix import IFShampoo

__all__ = ["IFShampoo", "RootFreeAdamW", "RootFreeRMSprop"]
__version__ = "0.1.0"
