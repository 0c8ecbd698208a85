"""Declared state: how each tensor starts, when it is allocated, how it is saved without a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import DTYPES, state_dtype
from .reference.matrix import join, split

State = dict[str, Tensor]
# State that a change of settings may ask for after the first step.
ADDED_LATER = frozenset({"momentum_buffer"})
_OWN = {"step", "square_avg", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def is_own(key: Any) -> bool:
    """Whether a key of `state[param]` is of an optimizer here, and not of a wrapper around it."""
    return isinstance(key, str) and (key in _OWN or key.startswith("factor_"))


@dataclass(frozen=True, eq=False)
class Initial:
    """A state tensor that is declared: its shape and dtype, and `value` (times the identity).

    A call builds it on a device; with `count`, so many of them as one tensor of one axis more.
    like: the parameter whose strides it has; such a tensor is never stacked.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float = 0.0
    identity: bool = False
    like: Tensor | None = None

    def __call__(self, device: torch.device, count: int | None = None) -> Tensor:
        if self.like is not None:
            return torch.full_like(
                self.like, self.value, dtype=self.dtype, device=device, requires_grad=False
            )
        shape = self.shape if count is None else (count, *self.shape)
        if not self.identity:
            return torch.full(shape, self.value, dtype=self.dtype, device=device)
        built = torch.zeros(shape, dtype=self.dtype, device=device)
        built.diagonal(dim1=-2, dim2=-1).fill_(self.value)
        return built


# The `step` count of every parameter.
initial_step = Initial((), torch.float32)


def full_like(param: Tensor, value: float) -> Initial:
    """State of a parameter's shape and strides, in its `state_dtype`."""
    return Initial(tuple(param.shape), state_dtype(param), value, like=param)


class DeclaredState(defaultdict[Any, Any]):
    """`optimizer.state`: its declared tensors are allocated when it is first read.

    `allocate` is called once, before the first read of what is in it or of whether anything is.
    """

    def __init__(self, states: Mapping[Any, Any], allocate: Callable[[], None]) -> None:
        super().__init__(dict, states)
        self._allocate: Callable[[], None] | None = allocate

    def fill(self) -> None:
        allocate, self._allocate = self._allocate, None
        if allocate is not None:
            allocate()

    def declare(self, allocate: Callable[[], None]) -> None:
        """There is more to allocate."""
        self._allocate = allocate

    def __reduce__(self) -> Any:
        """Of itself, without the optimizer, it is copied as what torch.optim has."""
        self.fill()
        return defaultdict, (dict, dict(dict.items(self)))

    def __copy__(self) -> Any:
        return defaultdict(dict, self)

    def copy(self) -> Any:
        return defaultdict(dict, self)

    def __missing__(self, key: Any) -> Any:
        self.fill()
        return self[key] if dict.__contains__(self, key) else super().__missing__(key)

    def __contains__(self, key: object) -> bool:
        self.fill()
        return super().__contains__(key)

    def __len__(self) -> int:
        self.fill()
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        self.fill()
        return super().__iter__()

    def get(self, key: Any, default: Any = None) -> Any:
        self.fill()
        return super().get(key, default)

    def keys(self) -> Any:
        self.fill()
        return super().keys()

    def values(self) -> Any:
        self.fill()
        return super().values()

    def items(self) -> Any:
        self.fill()
        return super().items()


def unused_momentum(group: Mapping[str, Any]) -> frozenset[str]:
    """State that a group without momentum does without."""
    return frozenset() if group["momentum"] else frozenset({"momentum_buffer"})


def momentum_buffers(states: Sequence[State], momentum: float) -> list[Tensor]:
    """The momentum buffers, or an empty list where the states have none and need none."""
    buffers = [state["momentum_buffer"] for state in states if "momentum_buffer" in state]
    if momentum and len(buffers) < len(states):
        raise RuntimeError(
            f"momentum is {momentum} but there are no momentum buffers yet; after changing it from "
            "0, run one step that is not compiled"
        )
    return buffers


def unstacked(states: Mapping[Any, State]) -> dict[Any, State]:
    """The states with a copy in place of every tensor that is a part of a larger storage.

    pickle would write the whole storage for each of its views, and torch.save at least once.
    """

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        partial = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        return value.clone() if partial else value

    return {
        param: {key: own(value) for key, value in state.items()} for param, state in states.items()
    }


def copied(value: Any) -> Any:
    """A copy of what `optimizer.state` holds, with each factor and its residual as one tensor."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if not isinstance(value, dict):
        return deepcopy(value)
    residuals = {key: f"{key}_residual" for key in value if f"{key}_residual" in value}
    return {
        key: join(part, value[residuals[key]]) if key in residuals else copied(part)
        for key, part in value.items()
        if key not in residuals.values()
    }


def separated(saved: Mapping[str, Any], spec: Mapping[str, Initial]) -> dict[str, Any]:
    """What `copied` made, with the factors in two parts where the optimizer keeps them so."""
    # torch.distributed.checkpoint puts {} for a key of the state that the checkpoint has not.
    saved = {key: value for key, value in saved.items() if not (is_own(key) and _is_empty(value))}
    parts = dict(saved)
    for key, value in saved.items():
        residual = f"{key}_residual"
        if residual in spec and residual not in saved:
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                parts[key], parts[residual] = split(value)
            elif not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
                parts[residual] = value  # refused, as the factor is
    return parts


def take_apart(state: State, spec: Mapping[str, Initial]) -> None:
    """Give state that was put in its place as it was saved (ZeroRedundancyOptimizer) its parts."""
    for key in [key for key in state if f"{key}_residual" in spec.keys() - state.keys()]:
        if isinstance(state[key], Tensor) and state[key].dtype == torch.float32:
            state[key], state[f"{key}_residual"] = split(state[key])


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def by_place(states: Mapping[Any, Any], places: Mapping[Any, int]) -> dict[Any, Any]:
    """The states by their parameters' places in the groups, and what is no parameter's.

    State of a parameter that is in no group, and the empty entry that a mere look at
    `optimizer.state[other]` leaves, are left out.
    """
    kept = {places[p]: state for p, state in states.items() if state and p in places}
    others = {key: value for key, value in states.items() if not isinstance(key, Tensor)}
    return {**dict(sorted(kept.items())), **others}


def saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with dtypes by name: torch.distributed gathers tensors, numbers and strings alone."""
    return {
        key: str(value).removeprefix("torch.")
        if isinstance(value, torch.dtype)
        else copied(value)
        if isinstance(value, Tensor)
        else value
        for key, value in group.items()
    }


def loaded_group(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `saved_group` made, with dtypes again where the group that takes it has one."""
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    return {
        key: by_name.get(value, value)
        if isinstance(group.get(key), torch.dtype) and isinstance(value, str)
        else value
        for key, value in saved.items()
    }
