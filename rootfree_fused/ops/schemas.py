"""The operators as PyTorch's dispatcher knows them, and how they are called.

lr and batch_size are 0-d tensors, so that a compiled step needs no recompile for other values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .methods import (
    ADAMW,
    METHODS,
    RMSPROP,
    SIGN,
    VECTOR_ADAM,
    VECTOR_ROOTFREE,
    DiagonalMethod,
)

IFSHAMPOO = (
    "ifshampoo_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] factors, "
    "Tensor(c!)[] residuals, Tensor(d!)[] factor_momenta, Tensor(e!)[] products, "
    "Tensor(f!)[] momentum_buffers, Tensor lr, *, int[] axes, bool update_factors, "
    "bool refresh_products, float factor_lr, float factor_momentum, float damping, "
    "float batch_size, float momentum, float weight_decay, bool decoupled, bool maximize, "
    "float? bound=None, bool[]? joint_norms=None, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> ()"
)
ROOTFREE_SHAMPOO = (
    "rootfree_shampoo_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] row_square_avgs, Tensor(d!)[] grams, Tensor(e!)[] factors, "
    "Tensor(f!)[] residuals, Tensor(g!)[] products, Tensor steps, Tensor lr, *, "
    "bool update_factors, bool refresh_products, float beta1, float beta2, float damping, "
    "float weight_decay, float update_rms, float? row_beta, bool maximize, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
# Weights with residuals, or states with scales, in float32 and back; all of a call in one format.
# beside is empty where there is neither; the others are as the diagonal methods' have them.
UNPACK = "unpack_(Tensor(a!)[] values, Tensor[] stored, Tensor[] beside) -> ()"
PACK = (
    "pack_(Tensor(a!)[] stored, Tensor(b!)[] beside, Tensor[] values, Tensor steps, *, "
    "int[] seeds, int[] firsts, int stream, Tensor? found_inf=None) -> ()"
)
# Gradients of micro-batches w g added to sums, and to parts, unless there are none, (w g)^2 or
# w sign(g); first: what they held before is overwritten.
ACCUMULATE = (
    "accumulate_(Tensor(a!)[] sums, Tensor(b!)[] parts, Tensor[] grads, *, float weight, "
    "bool signs, bool first) -> ()"
)
_library = torch.library.Library("rootfree_fused", "DEF")


def register(method: DiagonalMethod) -> None:
    """Make the operators of a diagonal method; C++ registers its bodies under the same names."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name} already; name this one otherwise")
    _library.define(method.schema)
    _library.define(method.lowbit_schema)
    dispatch.give_bodies(_library, method)
    METHODS[method.name] = method


def as_scalar_tensor(value: float | Tensor) -> Tensor:
    """A number as the 0-d float32 or float64 tensor that the operators take."""
    if isinstance(value, Tensor):
        value = value.detach().reshape(())
        return value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def mark_changed(params: Sequence[Tensor]) -> None:
    """Tell autograd that an operator wrote the parameters, so that a stale backward raises."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)


register(RMSPROP)
register(ADAMW)
register(SIGN)
register(VECTOR_ADAM)
register(VECTOR_ROOTFREE)
_library.define(IFSHAMPOO)
_library.define(ROOTFREE_SHAMPOO)
_library.define(UNPACK)
_library.define(PACK)
_library.define(ACCUMULATE)
dispatch.give_matrix_bodies(_library)
dispatch.give_list_bodies(_library)
