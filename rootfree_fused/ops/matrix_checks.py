"""Checks of the tensors of IF-Shampoo's buckets; every error names the tensor and the cure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..reference.structures import structure_of_stack
from .axes import sizes_of

DENSE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_buckets(
    params: Sequence[Tensor],
    axes: Sequence[int],
    per_axis: Mapping[str, Sequence[Tensor | None]],
    *,
    products_are_given: bool,
) -> None:
    """Raise unless the factors and what belongs to them fit each other and their parameters.

    per_axis: factors, residuals, products, and factor_momenta or grams, one an axis, bucket by
        bucket.
    """
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in axes):
        raise ValueError(f"axes is {list(axes)}; pass how many axes each bucket has, 1 or more")
    factors = per_axis["factors"]
    for name, tensors in per_axis.items():
        if len(tensors) != sum(axes):
            raise ValueError(
                f"{name} has {len(tensors)} entries but the buckets have {sum(axes)} axes "
                f"(axes={list(axes)}); pass one an axis"
            )
    member = first = 0
    for count in axes:
        indices = range(first, first + count)
        stacks = [_checked_factor(f"factors[{i}]", factors[i]) for i in indices]
        members = stacks[0].shape[0]
        own = params[member : member + members]
        shared = sizes_of(own[0].shape, stacks) if own else None
        for i, stack in zip(indices, stacks, strict=True):
            if stack.shape[0] != members or len(own) < members:
                raise ValueError(
                    f"factors[{i}] stacks {stack.shape[0]} where {members} parameters from "
                    f"params[{member}] on share a bucket and params has {len(params)}; stack one "
                    "factor a parameter"
                )
            if stack.device != own[0].device:
                raise ValueError(
                    f"factors[{i}] is on {stack.device} but params[{member}] is on "
                    f"{own[0].device}; move it with .to({str(own[0].device)!r})"
                )
            _check_dtype(i, stack, stacks)
        for i, stack in zip(indices, stacks, strict=True):
            _check_belongings(i, stack, per_axis, products_are_given=products_are_given)
        for i, param in enumerate(own, start=member):
            sizes = sizes_of(param.shape, stacks)
            if sizes is None or sizes != shared:
                raise ValueError(
                    f"params[{i}] has shape {tuple(param.shape)} but its bucket has axes of "
                    f"{shared or list(map(_size, stacks))}, which are not its own in their order, "
                    "nor neighbours of them merged; put it into a bucket of its own axes"
                )
            if param.device != own[0].device:
                raise ValueError(
                    f"params[{i}] is on {param.device} but its bucket is on {own[0].device}; put "
                    "it into a bucket of its own"
                )
        member, first = member + members, first + count
    if member != len(params):
        raise ValueError(
            f"params has {len(params)} tensors but the factors stack {member}; pass one factor an "
            "axis for each parameter"
        )


def _size(stack: Tensor) -> int | str:
    """Of the axis that a stack of factors is of, or what it may be."""
    *_, block = stack.shape
    count = stack.shape[1]
    return f"{(count - 1) * block + 1} to {count * block}" if stack.dim() == 4 else count


def _checked_factor(name: str, factor: Tensor | None) -> Tensor:
    if not isinstance(factor, Tensor):
        raise TypeError(f"{name} is a {type(factor).__name__}; pass a tensor")
    shape = tuple(factor.shape)
    dims = factor.dim()
    square = dims == 2 or (dims in (3, 4) and shape[-2] == shape[-1])
    if not square or not factor.numel() or (dims == 4 and shape[1] == 1):
        raise ValueError(
            f"{name} has shape {shape}; pass (members, d, d), (members, d) for a diagonal factor, "
            "or (members, n, b, b) for n > 1 blocks"
        )
    if not factor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass .contiguous()")
    return factor


def _check_dtype(i: int, stack: Tensor, stacks: Sequence[Tensor]) -> None:
    dense = {other.dtype for other in stacks if structure_of_stack(other).is_dense}
    wide = torch.float64 if torch.float64 in dense else torch.float32
    if structure_of_stack(stack).is_dense:
        allowed: tuple[torch.dtype, ...] = DENSE_DTYPES if len(dense) == 1 else ()
    else:
        allowed = (wide,) if dense else (torch.float32, torch.float64)
    if stack.dtype not in allowed:
        raise TypeError(
            f"factors[{i}] is {stack.dtype}; the dense factors of a bucket have one dtype of "
            "bfloat16, float32 and float64, and diagonal ones are float32, or float64 beside "
            "float64: cast it"
        )


def _check_belongings(
    i: int,
    factor: Tensor,
    per_axis: Mapping[str, Sequence[Tensor | None]],
    *,
    products_are_given: bool,
) -> None:
    """Whether the residual, the momentum and the product of a factor are what it needs."""
    dense = structure_of_stack(factor).is_dense
    needed = {
        "residuals": torch.int16 if dense and factor.dtype == torch.bfloat16 else None,
        "factor_momenta": factor.dtype,
        "grams": torch.float64 if factor.dtype == torch.float64 else torch.float32,
        "products": factor.dtype if dense and products_are_given else None,
    }
    for name in needed:
        if name not in per_axis:
            continue
        dtype, tensor = needed[name], per_axis[name][i]
        if dtype is None or (name == "products" and tensor is None):
            if tensor is not None:
                raise ValueError(
                    f"{name}[{i}] is a tensor where a factor of {factor.dtype} and shape "
                    f"{tuple(factor.shape)} has none; pass None"
                )
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}[{i}] is a {type(tensor).__name__}; pass a {dtype} tensor of shape "
                f"{tuple(factor.shape)}"
            )
        if (tensor.dtype, tensor.shape, tensor.device) != (dtype, factor.shape, factor.device):
            raise ValueError(
                f"{name}[{i}] is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on "
                f"{tensor.device} but factors[{i}] needs {dtype}, {tuple(factor.shape)} on "
                f"{factor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}] is not contiguous; pass .contiguous()")
