"""DiagonalOptimizer: what an optimizer needs beside its method's declaration and its settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import gradients_suit, is_sharded, usable_gradients
from ..ops.dispatch import DiagonalKernels, diagonal_kernels
from ..ops.methods import SECOND_MOMENT, DiagonalMethod
from ..ops.schemas import as_scalar_tensor
from . import formats
from .amp_and_graphs import Scaling
from .base import RootFreeOptimizer, Work
from .checks import name_of
from .groups import Group
from .known_tensors import (
    Call,
    PlanAtGradients,
    PreparedUpdate,
    addresses_of_grads,
    at_addresses,
    reader,
)
from .parts import Parts, of_operator, weights_of
from .shards import local, local_state
from .stacks import steps_of
from .starts import declared_start
from .state import MOMENTUM, RESIDUAL, Initial, State, full_like, momentum_buffers


class DiagonalOptimizer(RootFreeOptimizer):
    """Base of the optimizers whose update is a diagonal method; a subclass names it."""

    _method: DiagonalMethod
    _shaping = ("initial_square_avg", *formats.BEFORE)
    _added_later = formats.BEFORE

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        start = declared_start(group) if "initial_square_avg" in group else 0.0
        spec = {
            key: full_like(
                param, start if value is SECOND_MOMENT else value, optional=key == MOMENTUM
            )
            for key, value in self._method.states.items()
        }
        return formats.in_formats(param, group, spec)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)

    def _check_taken(self, index: int, position: int, group: Group) -> None:
        super()._check_taken(index, position, group)
        name, param = name_of(index, position, group), group["params"][position]
        formats.check_formats(name, param, group, is_sharded(param))

    def _update(self, index: int, work: Work) -> None:
        group = self.param_groups[index]
        if formats.are_used(group):
            for update in lowbit_updates(self._method, index, group, work):
                update.update(group, work.scaling)
            return
        states = state_lists(self._method, list(map(local_state, work.states)), group)
        tensors = list(map(local, work.params)), usable_gradients(work.params), *states
        update_(self._method, group, work.scaling, *tensors, work.steps, parts=work.parts)

    def _prepare(self, index: int, work: Work) -> PreparedUpdate:
        # The parts of the work, and not the work, which would keep the scaler's tensors.
        states, steps = list(map(local_state, work.states)), work.steps
        group = self.param_groups[index]
        if formats.are_used(group):
            addresses = addresses_of_grads(work.params)
            calls = lowbit_calls(self._method, index, group, work, addresses)

            def run(addresses: Tensor | None, group: Group, scaling: Scaling) -> None:
                for call in calls:
                    call(addresses, group, scaling)

            return at_addresses(addresses, run)
        lists = [list(map(local, work.params)), *state_lists(self._method, states, group)]
        suit = gradients_suit(work.params)
        known = KnownUpdate(
            self._method, lists, lambda: steps, reader(work.params), suit, work.parts
        )
        known.prepare()
        if known.kernels is None or known.plan is None:
            return PreparedUpdate(None, lambda _, *rest: known.update(*rest), None)
        return PreparedUpdate(known.plan, known.launch, known.kernels.move_grads)


class KnownUpdate:
    """The update of known tensors by a diagonal method: by a plan in Triton, or by the operator.

    lists: the parameters, and what the operator takes after their gradients.
    suit: whether `grads` gives the gradients themselves, and no copies.
    parts: what was accumulated of micro-batches, for a step on that.
    """

    _stem = "diag"  # of the file in kernels/

    def __init__(
        self,
        method: DiagonalMethod,
        lists: list[list[Tensor]],
        steps: Callable[[], Tensor],
        grads: Callable[[], list[Tensor]],
        suit: bool,
        parts: Parts | None,
        **random: Any,
    ) -> None:
        self._method, self._params, self._others = method, lists[0], lists[1:]
        self._parts = parts
        self._steps, self.grads, self._suit, self._random = steps, grads, suit, random
        self.kernels: DiagonalKernels | None = None
        self.plan: Any = None

    def prepare(self) -> None:
        """Make the plan for the gradients that there are; None where Triton does not serve."""
        if self._suit:
            self.kernels = diagonal_kernels(self._method.name, self._params, self._stem)
        if self.kernels is not None:
            lists = [self._params, self.grads(), *self._others]
            parts = {} if self._parts is None else {"parts": self._parts.tensors}
            self.plan = self.kernels.prepare(lists, **parts, **self._random)

    def launch(self, plan: Any, group: Group, scaling: Scaling) -> None:
        """One step by a plan."""
        assert self.kernels is not None
        steps, settings = self._numbers(group)
        settings["batch_size"] = group.get("batch_size", 1.0)
        lr = number_or_tensor(group["lr"])
        self.kernels.launch(self._method.name, plan, steps, lr, **settings, **scaling)

    def update(self, group: Group, scaling: Scaling) -> None:
        """One step by the operator."""
        tensors = self._params, self.grads(), *self._others
        update_(self._method, group, scaling, *tensors, self._steps(), parts=self._parts)

    def _numbers(self, group: Group) -> tuple[Tensor | None, dict[str, Any]]:
        """The steps, and the settings, that a launch takes."""
        (counted,) = _counted(self._method, self._steps(), group) or (None,)
        weights = weights_of(self._method, self._parts, group)
        return counted, self._method.settings(group) | weights


def lowbit_updates(
    method: DiagonalMethod,
    index: int,
    group: Group,
    work: Work,
    among: Iterable[int] | None = None,
) -> list[LowbitUpdate]:
    """The updates of a group with formats, one for all parameters whose state has the same.

    index: of the group. among: at which positions of the work; None for all.
    """
    places = work.places or formats.places_of(index, group, work.params)
    alike = defaultdict(list)
    for i in range(len(work.params)) if among is None else among:
        kept = [(k, v.dtype) for k, v in work.states[i].items() if formats.is_kept(k)]
        alike[tuple(sorted(kept, key=str))].append(i)
    placed = work._replace(places=places)
    return [LowbitUpdate(method, own, group, placed) for own in alike.values()]


class LowbitUpdate(KnownUpdate):
    """The update by a diagonal method of the parameters at these indices of a step's work, whose
    weights and states are in the same formats.
    """

    _stem = "lowbit"

    def __init__(
        self, method: DiagonalMethod, indices: list[int], group: Group, work: Work
    ) -> None:
        assert work.places is not None
        owned = [work.params[i] for i in indices]
        places = [work.places[i] for i in indices]
        states = [local_state(work.states[i]) for i in indices]
        beside = [
            [state[key] for state in states if key in state]
            for key in (RESIDUAL, *map(formats.scale_of, method.states))
        ]
        super().__init__(
            method,
            [list(map(local, owned)), *state_lists(method, states, group), *beside],
            steps_of(indices, work.steps),
            reader(owned),
            gradients_suit(owned),
            work.parts and work.parts.at(indices),
            seeds=[place.seed for place in places],
            firsts=[place.first for place in places],
        )
        self.indices = indices
        self._stochastic = group["param_residual"] == "stochastic"

    def update(self, group: Group, scaling: Scaling) -> None:
        steps, settings = self._numbers(group)
        if self._parts is not None:
            settings["parts"] = self._parts.tensors
        getattr(torch.ops.rootfree_fused, self._method.lowbit_name)(
            self._params,
            self.grads(),
            *self._others,
            steps,
            as_scalar_tensor(group["lr"]),
            **self._random,
            **settings,
            batch_size=as_scalar_tensor(group.get("batch_size", 1.0)),
            **scaling,
        )

    def _numbers(self, group: Group) -> tuple[Tensor, dict[str, Any]]:
        settings = {"stochastic": self._stochastic, **self._method.settings(group)}
        settings |= weights_of(self._method, self._parts, group)
        if self._method.counts:
            settings["bias_correction"] = group.get("bias_correction", True)
        return self._steps(), settings


class UpdateAtGradients:
    """A `Call` of an update, by its plan where that is for the gradients' addresses.

    owners: at which of the addresses the gradient of each parameter is.
    """

    def __init__(self, known: KnownUpdate, owners: list[int], addresses: Tensor | None) -> None:
        known.prepare()
        self._known = known
        self._plan = PlanAtGradients(known.kernels, known.plan, owners, known.grads(), addresses)

    def __call__(self, addresses: Tensor | None, group: Group, scaling: Scaling) -> None:
        plan = self._plan.at(addresses)
        if plan is None:
            self._known.update(group, scaling)
        else:
            self._known.launch(plan, group, scaling)


def lowbit_calls(
    method: DiagonalMethod,
    index: int,
    group: Group,
    work: Work,
    addresses: Tensor | None,
    among: Iterable[int] | None = None,
) -> list[Call]:
    """The calls of `lowbit_updates`; addresses: of the gradients of all of the work."""
    updates = lowbit_updates(method, index, group, work, among)
    return [UpdateAtGradients(update, update.indices, addresses) for update in updates]


def number_or_tensor(lr: float | Tensor) -> float | Tensor:
    """A step size as launches take it: a number needs no tensor."""
    return as_scalar_tensor(lr) if isinstance(lr, Tensor) else lr


def update_(
    method: DiagonalMethod,
    group: Group,
    scaling: Scaling,
    *tensors: Any,
    parts: Parts | None = None,
) -> None:
    """The method's operator on params, grads, states and steps, with a group's settings."""
    *lists, steps = tensors
    getattr(torch.ops.rootfree_fused, method.name)(
        *lists,
        *_counted(method, steps, group),
        as_scalar_tensor(group["lr"]),
        **method.settings(group),
        **of_operator(method, parts, group),
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
    return (steps if group.get("bias_correction", True) else None,) if method.counts else ()
