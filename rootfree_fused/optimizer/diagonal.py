"""Calls of the diagonal operators with a group's settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .amp_and_graphs import Scaling
from .groups import Group
from .state import State, momentum_buffers


def rmsprop_settings(group: Group) -> dict[str, Any]:
    """All but lr and batch_size, which operators take as tensors and launches as numbers."""
    return {
        "alpha": group["alpha"],
        "damping": group["damping"],
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "decoupled": group["weight_decay_mode"] == "decoupled",
        "maximize": group["maximize"],
    }


def rmsprop_state(states: list[State], group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """s and the momentum buffers of these parameters."""
    buffers = momentum_buffers(states, group["momentum"])
    return [state["square_avg"] for state in states], buffers


def update_rmsprop_(
    group: Group,
    scaling: Scaling,
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    buffers: list[Tensor],
) -> None:
    """Root-free RMSProp with a group's settings; IFShampoo uses it for vectors."""
    torch.ops.rootfree_fused.rmsprop_(
        params,
        grads,
        square_avgs,
        buffers,
        ops.as_scalar_tensor(group["lr"]),
        **rmsprop_settings(group),
        batch_size=ops.as_scalar_tensor(group["batch_size"]),
        **scaling,
    )
