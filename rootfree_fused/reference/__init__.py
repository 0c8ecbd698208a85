"""The specification: every update as a pure PyTorch function on tensors, in the paper's order."""

from .diag import adamw_, rmsprop_
from .matrix import apply_, is_update_step, join, precondition, split, update_factors_

__all__ = [
    "adamw_",
    "apply_",
    "is_update_step",
    "join",
    "precondition",
    "rmsprop_",
    "split",
    "update_factors_",
]
