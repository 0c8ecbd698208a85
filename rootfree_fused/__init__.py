"""Fused optimizers that precondition without a square root."""

from .diag import RootFreeAdamW, RootFreeRMSprop

__all__ = ["RootFreeAdamW", "RootFreeRMSprop"]
__version__ = "0.1.0"
