"""DTensors as the part of them that this rank has, which a step by elements works on.

A rank's part is a plain tensor, of no elements where the rank has none. A gradient is brought to
the layout of its parameter first, a collective only where the backward left it in another. What is
summed over ranks is two numbers at the start of a tensor's state; no later step asks another rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops.checks import is_sharded

T = TypeVar("T")


def local(value: T) -> T:
    """The part that this rank has of a DTensor; anything else as it is."""
    shards: Any = value
    return shards.to_local() if is_sharded(value) else value


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter with this rank's parts."""
    return {key: local(value) for key, value in state.items()}


def over_ranks(sums: Tensor, like: Any) -> Tensor:
    """The sum over the shards of a tensor of what each rank has found on its own.

    sums: on every rank of the tensor's mesh, of one shape. Replicas, which have found the same,
        count once.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    total = DTensor.from_local(sums, like.device_mesh, placements, run_check=False)
    return total.full_tensor()


def as_part(own: Tensor, shape: tuple[int, ...], like: Any) -> Tensor:
    """This rank's part of a DTensor of a shape, which lies as another does along its first axes."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def as_part_of(spread: Any, own: Any, shape: tuple[int, ...] | None = None) -> Any:
    """This rank's part of what lies as a DTensor; of anything else what it has instead.

    shape: of the whole, where it is not that of `spread`.
    """
    return as_part(own, shape or tuple(spread.shape), spread) if is_sharded(spread) else own


def as_laid_out(value: Tensor, like: Any) -> Tensor:
    """A tensor as a DTensor that lies as another does, or on its mesh if it is one already."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    if is_sharded(value):
        spread: Any = value
        if spread.device_mesh == mesh:
            return spread.redistribute(mesh, like.placements)  # type: ignore[no-any-return]
        value = spread.full_tensor()
    whole = value.detach().to(like.device)
    return distribute_tensor(whole, mesh, like.placements, src_data_rank=None)


def check_layout(name: str, tensor: Any, param: Any) -> None:
    """Raise a TypeError or ValueError where a tensor of a parameter's shape is not spread as it."""
    if is_sharded(tensor) != is_sharded(param):
        given = ("a plain tensor", "a DTensor")
        raise TypeError(
            f"{name} is {given[is_sharded(tensor)]} but the parameter is "
            f"{given[is_sharded(param)]}; make it one with distribute_tensor(it, "
            "param.device_mesh, param.placements), or of a DTensor take full_tensor()"
        )
    if is_sharded(param) and tensor.device_mesh != param.device_mesh:
        raise ValueError(
            f"{name} is on {tensor.device_mesh} but the parameter is on {param.device_mesh}; "
            "redistribute it to the mesh of the parameter"
        )
