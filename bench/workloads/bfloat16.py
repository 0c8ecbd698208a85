"""A network in float32 whose optimizer keeps the weights in bfloat16, as it would train on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def on_bfloat16_weights(build: Callable[[nn.Module], Optimizer], model: nn.Module) -> Optimizer:
    """The optimizer on bfloat16 copies of a model's weights, which the model then has.

    The forward pass sees what bfloat16 holds, activations stay float32, and gradients are rounded
    to bfloat16: what is lost is lost in the weights and the optimizer.
    """
    stored = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = build(stored)
    pairs = list(zip(model.parameters(), stored.parameters(), strict=True))

    def show(*_: Any) -> None:
        for param, weight in pairs:
            param.data.copy_(weight)

    def take_gradients(*_: Any) -> None:
        for param, weight in pairs:
            assert param.grad is not None
            weight.grad, param.grad = param.grad.to(torch.bfloat16), None

    show()
    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(show)
    return optimizer
