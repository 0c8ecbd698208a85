"""Declared state: how each tensor starts, when it is allocated, how it is saved without a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import state_dtype
from ..ops.methods import state_keys
from ..reference.matrix import join, split
from ..reference.structures import Structure
from .shards import as_part, local

State = dict[str, Tensor]
# The state that a group without momentum does without, and that a change of settings may ask for
# after the first step.
MOMENTUM = "momentum_buffer"
ROWS = "row_square_avg"  # v of root-free Shampoo
ADDED_LATER = frozenset({MOMENTUM, f"{MOMENTUM}_scale"})
# Beside a bfloat16 weight.
RESIDUAL = "param_residual"
# What every rank has of a matrix whose factors one has for all.
EVERYWHERE = frozenset({"step", RESIDUAL})


# What the keys of an axis start with, whose tensors are stacked over parameters.
STACKED = ("factor_", "gram_")


def is_own(key: Any) -> bool:
    """Whether a key of `state[param]` is of an optimizer here, and not of a wrapper around it."""
    if not isinstance(key, str):
        return False
    if key in ("step", ROWS, RESIDUAL) or key.startswith(STACKED):
        return True
    return key.removesuffix("_scale") in state_keys()


def is_of_rows(key: str) -> bool:
    """Whether a matrix' state of this key has an entry a row, if rows have a diagonal factor."""
    return key == ROWS or (key.startswith(STACKED) and key.endswith("_0"))


@dataclass(frozen=True, eq=False)
class Initial:
    """A state tensor that is declared: its shape and dtype, and the `value` of every element, or of
    the diagonal of a factor of a `structure`, of a size.

    A call builds it on a device; with `count`, so many of what it has a member as one tensor.
    batch_axes: how many of its first axes number members, stacked as those of other parameters.
    like: the parameter whose strides it has; such a tensor is never stacked.
    spread: the DTensor along with whose members, or rows, it lies, a tensor of its own too.
    optional: whether a group does without it until a change of settings asks for it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float = 0.0
    structure: Structure | None = None
    size: int = 0
    batch_axes: int = 0
    like: Tensor | None = None
    optional: bool = False
    spread: Tensor | None = None

    @property
    def lies_as(self) -> Tensor | None:
        """The parameter as which it lies on ranks and in memory, if it is no part of a stack."""
        return self.like if self.spread is None else self.spread

    def __call__(self, device: torch.device, count: int | None = None) -> Tensor:
        if self.like is not None:
            return torch.full_like(
                self.like, self.value, dtype=self.dtype, device=device, requires_grad=False
            )
        if self.spread is not None:
            axes = max(self.batch_axes, 1)
            here = tuple(local(self.spread).shape[:axes])
            own = replace(self, spread=None, shape=(*here, *self.shape[axes:]))
            return as_part(own(device), self.shape, self.spread)
        shape = self.shape if count is None else (count, *self.shape[self.batch_axes :])
        if self.structure is None:
            return torch.full(shape, self.value, dtype=self.dtype, device=device)
        built = torch.zeros(shape, dtype=self.dtype, device=device)
        self.structure.add_identity_(built, self.value, self.size)
        return built


# The `step` count of every parameter.
initial_step = Initial((), torch.float32)


def full_like(param: Tensor, value: float, *, optional: bool = False) -> Initial:
    """State of a parameter's shape and strides, in its `state_dtype`."""
    dtype = state_dtype(param)
    return Initial(tuple(param.shape), dtype, value, like=param, optional=optional)


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


def unused_state(group: Mapping[str, Any]) -> frozenset[str]:
    """Declared state that need not exist under a group's present settings."""
    return frozenset() if group.get("momentum", True) else ADDED_LATER


def momentum_buffers(states: Sequence[State], momentum: float) -> list[Tensor]:
    """The momentum buffers, or an empty list where the states have none and need none."""
    buffers = [state[MOMENTUM] for state in states if MOMENTUM in state]
    if momentum and len(buffers) < len(states):
        raise RuntimeError(
            f"momentum is {momentum} but there are no momentum buffers yet; after changing it from "
            "0, run one step that is not compiled"
        )
    return buffers


def take_apart(state: State, spec: Mapping[str, Initial]) -> None:
    """Give state that was put in its place as it was saved (ZeroRedundancyOptimizer) its parts."""
    for key in [key for key in state if f"{key}_residual" in spec.keys() - state.keys()]:
        if isinstance(state[key], Tensor) and state[key].dtype == torch.float32:
            state[key], state[f"{key}_residual"] = split(state[key])


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
