"""The specification: every update as a pure PyTorch function on tensors, in the paper's order."""

from .diag import adamw_, mean_square, rmsprop_
from .matrix import (
    apply_,
    initial_scale,
    is_update_step,
    join,
    largest_update,
    precondition,
    split,
    update_factors_,
)

__all__ = [
    "adamw_",
    "apply_",
    "initial_scale",
    "is_update_step",
    "join",
    "largest_update",
    "mean_square",
    "precondition",
    "rmsprop_",
    "split",
    "update_factors_",
]
