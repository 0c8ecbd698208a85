"""Scalars that the diagonal operators are called with."""

from __future__ import annotations

import torch

RMSPROP = {
    "alpha": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "batch_size": 8.0,
    "decoupled": True,
    "maximize": False,
}
ADAMW = {
    "beta1": 0.8,
    "beta2": 0.95,
    "damping": 1e-3,
    "weight_decay": 0.1,
    "batch_size": 8.0,
    "maximize": False,
}
SIGN = {
    "beta": 0.8,
    "weight_decay": 0.1,
    "batch_size": 1.0,  # which it does not read
    "sign_last": True,
    "maximize": False,
}
# Of the mean over four micro-batches of their signs.
OF_SIGNS = {**SIGN, "sign_last": False, "part_weight": 0.25}
# Of root-free Shampoo's vectors, which read no batch size.
VECTOR_ADAM = {
    "beta1": 0.8,
    "vector_beta2": 0.95,
    "weight_decay": 0.1,
    "vector_rms": 0.7,
    "batch_size": 1.0,
    "maximize": False,
}
VECTOR_ROOTFREE = {
    "beta1": 0.8,
    "vector_beta2": 0.95,
    "weight_decay": 0.1,
    "update_rms": 0.4,
    "batch_size": 1.0,
    "maximize": True,
}
# Which reads no batch size.


def for_operators(scalars):
    """The same as the operators take them: with batch_size as a tensor."""
    return {**scalars, "batch_size": torch.as_tensor(scalars["batch_size"], dtype=torch.float64)}
