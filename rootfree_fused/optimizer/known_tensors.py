"""Steps on tensors that are known already, with nothing done a parameter at a time from Python.

C++ compares the tensors of a step with those of the last one (csrc/known_tensors.cpp, or
`known_tensors_in_python` where it was not built for this torch). While they are what they were, the
launch that was prepared for them is right: settings are read anew, and gradients may be others of
the same layouts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ops import dispatch, extensions
from ..ops.checks import gradients_suit, is_sharded, usable_gradients
from ..ops.dispatch import DiagonalKernels, MatrixKernels
from . import known_tensors_in_python
from .amp_and_graphs import Scaling
from .stacks import Counts
from .state import State


def host() -> Any:
    """What compares the tensors of a step: the C++, or the same from Python."""
    return extensions.known_tensors() or known_tensors_in_python


class PreparedUpdate(NamedTuple):
    """An update of known tensors: a plan, how to run it with a group's settings, how to change it.

    `move` makes of a plan that of other gradients, from their addresses (int64, one a gradient);
    None where `run` asks for the gradients itself.
    """

    plan: Any
    run: Callable[[Any, dict[str, Any], Scaling], None]
    move: Callable[[Any, Tensor], Any] | None


# An update of known tensors with a group's settings and a scaler's. First where the gradients of
# all parameters are (int64, on the host), or None where that is not known.
Call = Callable[[Tensor | None, dict[str, Any], Scaling], None]


def at_addresses(addresses: Tensor | None, run: Call) -> PreparedUpdate:
    """An update by calls, whose plan is where the gradients are."""
    return PreparedUpdate(addresses, run, None if addresses is None else lambda _, moved: moved)


def addresses_of_grads(params: list[Tensor]) -> Tensor | None:
    """Where the gradients are, for launches that ask for no more; None where none does."""
    if not (any(map(dispatch.triton_serves, params)) and gradients_suit(params)):
        return None
    return torch.tensor([grad.data_ptr() for grad in reader(params)()], device="cpu")


def reader(params: list[Tensor]) -> Callable[[], list[Any]]:
    """How to read the gradients of these parameters, of the dtypes and layouts that they have now.

    Of DTensors this rank's parts.
    """
    if not gradients_suit(params):
        return lambda: usable_gradients(params)
    if not any(map(is_sharded, params)):
        return lambda: [p.grad for p in params]
    return lambda: host().gradients(params)


class PlanAtGradients:
    """A plan of Triton's launches, for the gradients of some parameters wherever they are.

    plan: for `grads`, those of members of the parameters at the indices `owners`, whose own are at
        `addresses` now; None where there is none.
    """

    def __init__(
        self,
        kernels: DiagonalKernels | MatrixKernels | None,
        plan: Any,
        owners: list[int],
        grads: list[Tensor],
        addresses: Tensor | None,
    ) -> None:
        self._kernels, self._plan, self._moved = kernels, plan, plan
        self._addresses = addresses
        self._owners = torch.tensor(owners, dtype=torch.long, device="cpu")
        if addresses is not None:  # a member's gradient lies where its owner's does, and so far on
            own = torch.tensor([grad.data_ptr() for grad in grads], device="cpu")
            self._offsets = own - addresses[self._owners]

    def at(self, addresses: Tensor | None) -> Any:
        """The plan, or None where the operator has to look at the tensors."""
        if self._kernels is None or self._plan is None or addresses is None:
            return None
        if addresses is not self._addresses:
            here = addresses[self._owners] + self._offsets
            self._moved = self._kernels.move_grads(self._plan, here)
            self._addresses = addresses
        return self._moved


class PreparedStep(NamedTuple):
    """A launch for the tensors that a fingerprint describes. It keeps no gradient alive."""

    fingerprint: Any
    grads: bytes
    states: list[State]  # of every parameter of the group
    params: list[Tensor]  # those that have a gradient
    counts: Counts
    launch: PreparedUpdate
    made: int | None  # which parts of micro-batches it takes; see `Accumulated`

    def run(self, group: dict[str, Any], scaling: Scaling) -> None:
        """A step, after `counts` has counted it."""
        self.launch.run(self.launch.plan, group, scaling)
        host().mark_changed(self.params)

    def with_grads(self, grads: bytes) -> PreparedStep:
        """For gradients at these addresses."""
        if self.launch.move is None or grads == self.grads:
            return self
        addresses = torch.frombuffer(bytearray(grads), dtype=torch.int64)
        plan = self.launch.move(self.launch.plan, addresses)
        return self._replace(grads=grads, launch=self.launch._replace(plan=plan))


class PreparedSteps:
    """What the last steps prepared, by the place of the group.

    Of each group several, the one that ran last first: which parameters have a gradient may change
    from step to step, with experts and with layers that are left out.
    """

    _KEPT = 8

    def __init__(self) -> None:
        self._steps: dict[int, list[PreparedStep]] = {}
        self._counts: dict[int, list[tuple[list[Tensor], Counts]]] = {}
        self._states: list[State] = []

    def forget_unless_owned(self, state: dict[Tensor, State]) -> None:
        """Drop all of it if the parameters' state dicts are no longer the same objects."""
        if not host().has_values(state, self._states):
            self._steps.clear()
            self._states = list(state.values())

    def forget(self, index: int) -> None:
        """Drop what is known of a group, whose settings ask for another look."""
        self._steps.pop(index, None)

    def find(self, index: int, params: list[Tensor], made: int | None) -> PreparedStep | None:
        """The step that is right for these parameters, their gradients and state, if there is."""
        known = self._steps.get(index, [])
        for position, step in enumerate(known):
            if step.made != made:
                continue
            grads = host().unchanged(params, step.states, step.fingerprint)
            if grads is not None:
                if position:
                    del known[position]
                    known.insert(0, step)
                known[0] = step.with_grads(grads)
                return known[0]
        return None

    def keep(self, index: int, prepared: PreparedStep) -> None:
        known = self._steps.setdefault(index, [])
        known.insert(0, prepared)
        del known[self._KEPT :]

    def counts(self, index: int, steps: list[Tensor]) -> Counts:
        """The counts of these steps, the same ones as before: what was read of them still holds."""
        known = self._counts.setdefault(index, [])
        for own, counts in known:
            if len(own) == len(steps) and all(map(operator.is_, own, steps)):
                return counts
        known.insert(0, (steps, Counts(steps)))
        del known[self._KEPT :]
        return known[0][1]


T = TypeVar("T")


class KnownGradients(Generic[T]):
    """What was found of parameters with their gradients, by the place of their group."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, list[State], T]] = {}

    def find(self, index: int, params: list[Tensor]) -> T | None:
        """It, while all of them are what they were but for where gradients are."""
        if index not in self._known:
            return None
        seen, states, found = self._known[index]
        return None if host().unchanged(params, states, seen) is None else found

    def keep(self, index: int, params: list[Tensor], found: T) -> None:
        states: list[State] = [{} for _ in params]
        seen = fingerprint(params, states)
        self._known.pop(index, None)
        if seen is not None:
            self._known[index] = seen[0], states, found


def fingerprint(params: list[Tensor], states: list[State]) -> tuple[Any, bytes] | None:
    """What and where the tensors are; None where one of them is no plain tensor."""
    found: tuple[Any, bytes] | None = host().fingerprint(params, states)
    return found
