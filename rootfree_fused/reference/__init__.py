"""The specification: every update as a pure PyTorch function on tensors, in the paper's order."""

from .diag import (
    SquareWeights,
    accumulate_,
    adamw_,
    mean_square,
    rmsprop_,
    second_moment,
    sign_,
    square_weights,
)
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
    "SquareWeights",
    "accumulate_",
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
    "second_moment",
    "shape_scale",
    "sign_",
    "split",
    "square_weights",
    "start_values",
    "update_factors_",
    "vector_adam_",
    "vector_rootfree_",
]
