"""Saving and loading: a copy of all state, and back into it to the bit, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..ops.checks import DTYPES
from ..reference.matrix import split
from .checkpoint_checks import (
    check_data,
    check_is_dict,
    check_named,
    check_saved,
    check_settings,
    check_sizes,
    check_state_dict,
    fresh,
    labels,
    takes,
)
from .checks import check_state
from .formats import BEFORE, check_in_formats, check_kept, formats_of
from .groups import DeclaringOptimizer, Group, devices_of, trains
from .starts import AUTO
from .state import EVERYWHERE, Initial, State, copied, is_own, unused_state


def state_dict(optimizer: DeclaringOptimizer) -> dict[str, Any]:
    """See `RootFreeOptimizer.state_dict`."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)

    positions: dict[Tensor, int] = {}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        declare_and_check(optimizer, index, group)
        for param in group["params"]:
            positions.setdefault(param, len(positions))
        groups.append({**saved_group(group), "params": [positions[p] for p in group["params"]]})
    states = by_position(dict(dict.items(optimizer.state)), positions)
    owners = {positions[p]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    saved = {
        key: optimizer._saved_state(*owners[key], state) if key in owners else copied(state)
        for key, state in states.items()
    }

    state_dict = {"state": saved, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        state_dict = post_hook(optimizer, state_dict) or state_dict
    return state_dict


def load_state_dict(optimizer: DeclaringOptimizer, state_dict: dict[str, Any]) -> None:
    """See `RootFreeOptimizer.load_state_dict`."""
    check_is_dict(state_dict)
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict

    check_state_dict(state_dict)
    saved_groups = deepcopy(state_dict["param_groups"])
    groups = _merge_groups(optimizer, saved_groups)
    keys = list(chain.from_iterable(g["params"] for g in saved_groups))
    owners = [(param, group) for group in groups for param in group["params"]]
    saved = state_dict["state"]
    check_named(saved, keys)
    for group, old in zip(groups, saved_groups, strict=True):
        for key, param in zip(old["params"], group["params"], strict=True):
            if saved.get(key) and not is_lazy(param):
                check_formats_of(optimizer, key, param, group, old, saved[key])
    wrappers = {key: copied(value) for key, value in saved.items() if key not in keys}
    # torch.distributed.checkpoint passes on no state of a frozen parameter: what it has stays.
    loaded = [
        (param, group, _check_loaded(optimizer, label, param, group, saved.get(key, {})))
        for key, label, (param, group) in zip(keys, labels(saved_groups), owners, strict=True)
        if saved.get(key) or (param.requires_grad and not is_lazy(param))
    ]

    optimizer.param_groups = groups
    optimizer._forget()
    for index, group in enumerate(groups):
        _write_states(optimizer, index, group, [(p, s) for p, own, s in loaded if own is group])
    dict.update(optimizer.state, wrappers)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def check_formats_of(
    optimizer: DeclaringOptimizer,
    key: Any,
    param: Tensor,
    group: Group,
    old: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Raise a ValueError where saved state has not what the formats of its group have.

    old: that group, as saved.
    """
    saved_as = {**group, **BEFORE, **formats_of(old)}
    spec = optimizer._full_spec(param, saved_as)
    check_in_formats(f"state_dict of parameter {key}", saved_as, spec, saved)


def declare_and_check(optimizer: DeclaringOptimizer, index: int, group: Group) -> None:
    """Allocate what state a group lacks, and raise where some does not fit."""
    optimizer._check_kept(index, group)
    params = [p for p in group["params"] if trains(p) or dict.get(optimizer.state, p)]
    for param, (name, spec) in zip(params, optimizer._declare(index, group, params), strict=True):
        check_state(name, param, optimizer.state[param], spec)


def _merge_groups(optimizer: DeclaringOptimizer, saved_groups: list[Group]) -> list[Group]:
    """The saved groups with this optimizer's parameters."""
    check_sizes(optimizer.param_groups, saved_groups)
    groups = []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        where = f"state_dict group {index}"
        owner = type(optimizer)
        saved = owner._as_of_today(saved)
        check_settings(where, owner.__name__, owner._converters, group, saved)
        kept = {**check_kept(index, group, saved), "params": group["params"]}
        merged = {**group, **loaded_group(group, saved), **kept}
        try:
            optimizer._check_group(merged)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        _check_fixed(optimizer, index, group, merged)
        groups.append(merged)
    return groups


def _check_fixed(optimizer: DeclaringOptimizer, index: int, group: Group, merged: Group) -> None:
    """Raise a ValueError for a setting that a load must not change."""
    for name in optimizer._fixed:
        if group[name] is not None and group[name] != merged[name]:
            raise ValueError(
                f"{name} of group {index} is {group[name]} but the state_dict has "
                f"{merged[name]}; build the optimizer with {name}={merged[name]}"
            )


def _check_loaded(
    optimizer: DeclaringOptimizer,
    label: str,
    param: Tensor,
    group: Group,
    saved: Mapping[str, Any],
) -> State:
    """A copy of the saved state of one parameter, or a ValueError: what does not fit."""
    where = f"state_dict of parameter {label}"
    if is_lazy(param):
        raise ValueError(
            f"{where} has no parameter yet to go to: a lazy module makes it in its first call; "
            "call the model once, then load"
        )
    spec = optimizer._full_spec(param, group)
    saved = optimizer._whole_state(param, group, saved)
    check_data(where, param, saved)
    saved = separated(saved, spec)
    own = {name for name in saved if is_own(name)}
    needed = spec.keys() - unused_state(group)
    if not needed <= own <= spec.keys():
        raise ValueError(
            f"{where} has keys {sorted(own)} where "
            f"{type(optimizer).__name__} needs {sorted(needed)}; load a checkpoint of "
            f"{type(optimizer).__name__} that was saved with the same settings"
        )
    present = {name: initial for name, initial in spec.items() if name in saved}
    devices = devices_of(spec, param, group)
    loaded = {
        name: fresh(spec[name], value, devices[name])
        for name, value in check_saved(where, present, saved).items()
    }
    if not optimizer._keeps(param, group):
        loaded = {
            name: value if name in EVERYWHERE else value.new_empty(0)
            for name, value in loaded.items()
        }
    # What a wrapper keeps here is its own: as it was saved, on the parameter's device.
    others = {name: copied(value) for name, value in saved.items() if name not in own}
    for name, value in others.items():
        others[name] = value.to(param.device) if isinstance(value, Tensor) else value
    return {**loaded, **others}


def _write_states(
    optimizer: DeclaringOptimizer, index: int, group: Group, loaded: list[tuple[Tensor, State]]
) -> None:
    """Make the states hold the loaded values, in the tensors that are there where they fit."""
    for param, values in loaded:
        state = dict.setdefault(optimizer.state, param, {})
        spec = optimizer._full_spec(param, group)
        # Other structures, merged axes: the checkpoint's settings come with its shapes.
        fits = all(
            takes(state[key], values[key]) if key in state else spec[key].optional
            for key in spec
            if key in values
        )
        for key in [key for key in state if key not in values or (is_own(key) and not fits)]:
            del state[key]
    optimizer._declare(index, group, [param for param, _ in loaded])
    optimizer._shaped_by[index] = {name: group[name] for name in optimizer._shaping}
    for param, values in loaded:
        state = optimizer.state[param]
        for key, value in values.items():
            if is_own(key) and key in state:
                state[key].copy_(value)
            else:
                state[key] = value
    written = [
        optimizer.state[param]
        for param, _ in loaded
        if param.numel() and optimizer._keeps(param, group)
    ]
    batch_axes = group.get("batch_axes", 0)
    waits = group.get("initial_square_avg") == AUTO
    if waits and optimizer._starts.forget(index, written, batch_axes):
        optimizer._prepared.forget(index)


# What is saved of one tensor, state or group, and back


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


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def by_position(states: Mapping[Any, Any], positions: Mapping[Any, int]) -> dict[Any, Any]:
    """The states by their parameters' positions in the groups, and what is no parameter's.

    State of a parameter that is in no group, and the empty entry that a mere look at
    `optimizer.state[other]` leaves, are left out.
    """
    kept = {positions[p]: state for p, state in states.items() if state and p in positions}
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
