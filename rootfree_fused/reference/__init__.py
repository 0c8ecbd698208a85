"""The specification: every update as a pure PyTorch function on tensors, in the paper's order."""

from .diag import adamw_, rmsprop_

__all__ = ["adamw_", "rmsprop_"]
