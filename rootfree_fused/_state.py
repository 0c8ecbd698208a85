"""State tensors: how step counts are stacked, and how state is saved and loaded without a loss."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import DTYPES, state_dtype

State = dict[str, Tensor]
# Builds a state tensor's first value on a device; on "meta" it is a declaration that costs nothing.
Initial = Callable[[torch.device], Tensor]


def initial_step(device: torch.device) -> Tensor:
    """The `step` count of every parameter: 0-d float32."""
    return torch.zeros((), dtype=torch.float32, device=device)


def full_like(param: Tensor, value: float) -> Initial:
    """State of a parameter's shape and strides, in its `state_dtype`."""
    return functools.partial(_build_full_like, param, value)


def _build_full_like(param: Tensor, value: float, device: torch.device) -> Tensor:
    return torch.full_like(
        param, value, dtype=state_dtype(param), device=device, requires_grad=False
    )


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


def stack(states: Sequence[State], key: str) -> Tensor:
    """Make the states' tensors under `key` views of one tensor, and return that."""
    stacked = torch.stack([state[key] for state in states])
    for state, view in zip(states, stacked.unbind(), strict=True):
        state[key] = view
    return stacked


def stack_steps(states: Sequence[State]) -> list[Tensor]:
    """Stack the step counts on each device; return the stacks."""
    by_device: dict[torch.device, list[State]] = defaultdict(list)
    for state in states:
        by_device[state["step"].device].append(state)
    return [stack(members, "step") for members in by_device.values()]


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


def by_place(states: Mapping[Any, State], places: Mapping[Any, int]) -> dict[int, State]:
    """The states by their parameters' places in the groups.

    Raises:
        ValueError: state of what no group has; an empty entry, which a mere look at
            `optimizer.state[other]` leaves, is none.
    """
    kept = {param: state for param, state in states.items() if state}
    if strangers := kept.keys() - places.keys():
        names = [tuple(s.shape) if isinstance(s, Tensor) else s for s in strangers]
        raise ValueError(
            f"optimizer.state has entries that no group has, of shapes or keys {names}: a "
            "checkpoint cannot name them; delete optimizer.state[param] when param leaves its group"
        )
    return {places[param]: state for param, state in kept.items()}


def saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with dtypes by name: torch.distributed gathers tensors, numbers and strings alone."""
    return {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
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


def check_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError unless it has the two parts that every optimizer's state_dict has."""
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"state_dict has the keys {sorted(state_dict, key=str)}, without "
            f"{', '.join(sorted(missing))}; pass what state_dict() of the optimizer returned"
        )


def check_named(saved: Mapping[Any, Any], keys: Sequence[Any]) -> None:
    """Raise a ValueError for state of a parameter that is not among the keys of the groups."""
    if unknown := saved.keys() - set(keys):
        raise ValueError(
            f"state_dict has state for parameters {sorted(unknown, key=str)} that none of its "
            "groups names; load it into the optimizer that saved it and save it again"
        )


def check_saved(where: str, spec: Mapping[str, Initial], saved: Mapping[str, Any]) -> State:
    """The saved values as tensors that the declared state can take without a loss.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    return {key: _checked(f"{where}: {key}", initial, saved[key]) for key, initial in spec.items()}


def _checked(where: str, initial: Initial, value: Any) -> Tensor:
    declared = initial(torch.device("meta"))
    if initial is initial_step and isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}; it must be a tensor")
    if value.shape != declared.shape:
        raise ValueError(
            f"{where} has shape {tuple(value.shape)} but this model needs "
            f"{tuple(declared.shape)}; load it into the model that it was saved with"
        )
    if initial is not initial_step and (
        torch.promote_types(value.dtype, declared.dtype) != declared.dtype
    ):
        raise ValueError(
            f"{where} is {value.dtype} but this optimizer keeps {declared.dtype}, which would lose "
            f"bits; use parameters of the saved dtype, or cast it to {declared.dtype} first"
        )
    return value
