"""A float32 model in bfloat16, with what that rounds away kept by the optimizer, and back."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .optimizer import formats
from .optimizer.base import RootFreeOptimizer
from .optimizer.checkpoint import declare_and_check
from .optimizer.checks import name_of
from .optimizer.groups import Group
from .optimizer.shards import local
from .optimizer.state import RESIDUAL
from .reference.formats import split_weight, unpacked


@torch.no_grad()
def to_bfloat16_(
    model: nn.Module, optimizer: RootFreeOptimizer, param_residual: Literal[8, 16] = 8
) -> None:
    """Make a float32 model bfloat16, as `model.to(torch.bfloat16)`, and lose none of its weights.

    What a weight has beyond its bfloat16 goes into the optimizer's state, whose groups then have
    this `param_residual`. The optimizer's other state stays as it is. `to_float32_` is the way
    back. What the optimizer does not train, frozen parameters without state, others of the model
    and buffers, is rounded to bfloat16 alone.

    Of a model in DistributedDataParallel convert what is inside before it is wrapped; one that
    fully_shard has sharded before its first forward.

    Args:
        model: it has all parameters of the optimizer, in float32. Its buffers become bfloat16 too.
        optimizer: one with a `param_residual`, which is None so far; before or after its first
            step.
        param_residual: 8, which keeps 16 significant bits, or 16, which keeps all.

    Raises:
        TypeError: no module, an optimizer without residuals, or parameters in another dtype.
        ValueError: a parameter of the optimizer that is not the model's, no such residual, a group
            whose other settings take none, or a model that cannot be converted any more. Nothing
            has changed then.
    """
    owned = _owned(
        model,
        optimizer,
        torch.float32,
        "a bfloat16 model needs no conversion: pass param_residual to the constructor",
    )
    if param_residual not in (8, 16):
        raise ValueError(f"param_residual is {param_residual!r}; pass 8 or 16")
    bits = int(param_residual)
    for index, group in enumerate(optimizer.param_groups):
        with_it = {**group, "param_residual": bits}
        optimizer._check_named(index, optimizer._check_group, with_it)

    kept = [split_weight(local(p.detach()), formats.RESIDUALS[bits]) for p, _ in owned]
    with optimizer._without_weak_references():
        model.to(torch.bfloat16)
    _set_residual(optimizer, bits)
    for (param, group), (high, low) in zip(owned, kept, strict=True):
        local(param.detach()).copy_(high)
        if state := dict.get(optimizer.state, param):
            state[RESIDUAL] = optimizer._full_spec(param, group)[RESIDUAL](param.device)
            local(state[RESIDUAL]).copy_(low)


@torch.no_grad()
def to_float32_(model: nn.Module, optimizer: RootFreeOptimizer) -> None:
    """Make a bfloat16 model float32, with all that its optimizer has kept of the weights.

    The way back from `to_bfloat16_`, for a model to export or to go on with in float32. Groups then
    have `param_residual` None; the optimizer's other state stays as it is.

    Args:
        model: it has all parameters of the optimizer, in bfloat16. Its buffers become float32 too.
        optimizer: with any `param_residual`.

    Raises:
        TypeError: no module, an optimizer without residuals, or parameters in another dtype.
        ValueError: a parameter of the optimizer that is not the model's, state that does not fit,
            or a model that cannot be converted any more. Nothing has changed then.
    """
    owned = _owned(model, optimizer, torch.bfloat16, "a float32 model needs no conversion")
    states = [dict.get(optimizer.state, param) or {} for param, _ in owned]
    residuals = [state.get(RESIDUAL) for state in states]
    values = [
        unpacked(local(param.detach()), None if residual is None else local(residual))
        for (param, _), residual in zip(owned, residuals, strict=True)
    ]
    with optimizer._without_weak_references():
        model.to(torch.float32)
    _set_residual(optimizer, None)
    for (param, _), state, value in zip(owned, states, values, strict=True):
        local(param.detach()).copy_(value)
        state.pop(RESIDUAL, None)


def _owned(model: Any, optimizer: Any, dtype: torch.dtype, cure: str) -> list[tuple[Tensor, Group]]:
    """The parameters of an optimizer with their groups, after a check that all can be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the module that is trained")
    known = isinstance(optimizer, RootFreeOptimizer) and formats.have_settings(optimizer.defaults)
    if not known:
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass one that has a param_residual"
        )
    _check_model(model)
    inside = {id(param) for param in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            name = name_of(index, position, group)
            if id(param) not in inside:
                raise ValueError(f"{name} is not one of the model; pass the model that has it")
            if is_lazy(param):
                raise ValueError(f"{name} is made in the first call of the model; call it once")
            if param.dtype != dtype:
                raise TypeError(f"{name} is {param.dtype} and not {dtype}; {cure}")
    for index, group in enumerate(optimizer.param_groups):
        declare_and_check(optimizer, index, group)
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _check_model(model: nn.Module) -> None:
    """Raise where something holds on to the dtypes or to the tensors of the parameters."""
    if torch.__future__.get_overwrite_module_params_on_conversion():
        raise ValueError(
            "torch.__future__.set_overwrite_module_params_on_conversion(True) gives a model other "
            "parameters than the optimizer has; set it to False"
        )
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel averages gradients of the dtype that it was built for; "
                "convert the model first, then wrap it"
            )
        sharded = getattr(module, "_get_fsdp_state", None)
        if sharded is not None and getattr(sharded(), "_is_root", None) is not None:
            raise ValueError(
                "fully_shard gathers parameters of the dtype of the first forward; convert the "
                "model before that"
            )


def _set_residual(optimizer: RootFreeOptimizer, param_residual: int | None) -> None:
    """Give every group this `param_residual`, and those to come."""
    optimizer.defaults["param_residual"] = param_residual
    for index, group in enumerate(optimizer.param_groups):
        group["param_residual"] = param_residual
        optimizer._shaped_by.get(index, {})["param_residual"] = param_residual
        optimizer._prepared.forget(index)
