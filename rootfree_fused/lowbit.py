"""A float32 model in bfloat16, with what that rounds away kept by the optimizer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .optimizer import formats
from .optimizer.base import RootFreeOptimizer
from .optimizer.checks import name_of
from .optimizer.groups import trains
from .optimizer.shards import local
from .optimizer.state import RESIDUAL
from .reference.formats import split_weight


@torch.no_grad()
def to_bfloat16_(
    model: nn.Module, optimizer: RootFreeOptimizer, param_residual: Literal[8, 16] = 8
) -> None:
    """Make a float32 model bfloat16, as `model.to(torch.bfloat16)`, and lose none of its weights.

    What a weight has beyond its bfloat16 goes into the optimizer's state, whose groups then have
    this `param_residual`. The optimizer's other state stays as it is.

    Args:
        model: it has all parameters of the optimizer, in float32. Its buffers become bfloat16 too.
        optimizer: one with a `param_residual`, which is None so far; before or after its first
            step.
        param_residual: 8, which keeps 16 significant bits, or 16, which keeps all.

    Raises:
        TypeError: no module, an optimizer without residuals, or parameters in another dtype.
        ValueError: a parameter of the optimizer that is not the model's, or no such residual.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the module that is trained")
    known = isinstance(optimizer, RootFreeOptimizer) and formats.have_settings(optimizer.defaults)
    if not known:
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass one that has a param_residual"
        )
    if param_residual not in (8, 16):
        raise ValueError(f"param_residual is {param_residual!r}; pass 8 or 16")
    inside = {id(param) for param in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            name = name_of(index, position, group)
            if id(param) not in inside:
                raise ValueError(f"{name} is not one of the model; pass the model that has it")
            if param.dtype != torch.float32:
                raise TypeError(f"{name} is {param.dtype}; only float32 has what a residual keeps")

    for index, group in enumerate(optimizer.param_groups):
        optimizer._declare(index, group, list(filter(trains, group["params"])))
    owned = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    kept = [split_weight(local(p.detach()), formats.RESIDUALS[param_residual]) for p, _ in owned]
    with optimizer._without_weak_references():
        model.to(torch.bfloat16)
    for index, group in enumerate(optimizer.param_groups):
        group["param_residual"] = param_residual
        optimizer._shaped_by.get(index, {})["param_residual"] = param_residual
        optimizer._prepared.forget(index)
    for (param, group), (high, low) in zip(owned, kept, strict=True):
        local(param.detach()).copy_(high)
        if state := dict.get(optimizer.state, param):
            state[RESIDUAL] = optimizer._full_spec(param, group)[RESIDUAL](param.device)
            local(state[RESIDUAL]).copy_(low)
