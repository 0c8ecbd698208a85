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
from .rootfree_shampoo import (
    rootfree_shampoo_,
    shape_scale,
    start_values,
    vector_adam_,
    vector_rootfree_,
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
    "rootfree_shampoo_",
    "shape_scale",
    "split",
    "start_values",
    "update_factors_",
    "vector_adam_",
    "vector_rootfree_",
]
