"""DiagonalOptimizer: what an optimizer needs beside its method's declaration and its settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.checks import gradients_suit
from ..ops.dispatch import diagonal_kernels
from ..ops.methods import SECOND_MOMENT, DiagonalMethod
from ..ops.schemas import as_scalar_tensor
from .amp_and_graphs import Scaling
from .base import RootFreeOptimizer, Work
from .groups import Group
from .known_tensors import PreparedUpdate, on_gradients
from .starts import declared_start
from .state import MOMENTUM, Initial, State, full_like, momentum_buffers


class DiagonalOptimizer(RootFreeOptimizer):
    """Base of the optimizers whose update is a diagonal method; a subclass names it."""

    _method: DiagonalMethod
    _shaping = ("initial_square_avg",)

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        start = declared_start(group)
        return {
            key: full_like(
                param, start if value is SECOND_MOMENT else value, optional=key == MOMENTUM
            )
            for key, value in self._method.states.items()
        }

    def _update(self, index: int, work: Work) -> None:
        group = self.param_groups[index]
        states = state_lists(self._method, work.states, group)
        steps = _counted(self._method, work.steps, group)
        update_(self._method, group, work.scaling, work.params, work.grads, *states, *steps)

    def _prepare(self, index: int, work: Work) -> PreparedUpdate:
        # The parts of the work, and not the work, which would keep the gradients.
        method, params, steps = self._method, work.params, work.steps
        states = state_lists(method, work.states, self.param_groups[index])
        kernels = diagonal_kernels(method.name, params) if gradients_suit(params) else None
        plan = kernels and kernels.prepare([params, work.grads, *filter(None, states)])

        def launch(plan: Any, group: Group, scaling: Scaling) -> None:
            assert kernels is not None
            (counted,) = _counted(method, steps, group) or (None,)
            lr = group["lr"]
            settings = {**method.settings(group), "batch_size": group["batch_size"]}
            lr = as_scalar_tensor(lr) if isinstance(lr, Tensor) else lr  # a number needs no tensor
            kernels.launch(method.name, plan, counted, lr, **settings, **scaling)

        def update(grads: list[Tensor], group: Group, scaling: Scaling) -> None:
            counted = _counted(method, steps, group)
            update_(method, group, scaling, params, grads, *states, *counted)

        if kernels is not None and plan:
            return PreparedUpdate(plan, launch, kernels.move_grads)
        return on_gradients(params, update)


def update_(method: DiagonalMethod, group: Group, scaling: Scaling, *tensors: Any) -> None:
    """The method's operator on params, grads, states and steps, with a group's settings."""
    getattr(torch.ops.rootfree_fused, method.name)(
        *tensors,
        as_scalar_tensor(group["lr"]),
        **method.settings(group),
        batch_size=as_scalar_tensor(group.get("batch_size", 1.0)),
        **scaling,
    )


def state_lists(method: DiagonalMethod, states: list[State], group: Group) -> list[list[Tensor]]:
    """One list a state of the method, in its order; that of unused momentum buffers is empty."""
    return [
        momentum_buffers(states, group["momentum"])
        if key == MOMENTUM
        else [state[key] for state in states]
        for key in method.states
    ]


def _counted(method: DiagonalMethod, steps: Tensor, group: Group) -> tuple[Tensor | None, ...]:
    """The argument `steps` of a method that has it: none without bias correction."""
    return (steps if group["bias_correction"] else None,) if method.counts else ()
