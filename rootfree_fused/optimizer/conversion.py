"""State of another optimizer on the same parameters as a state_dict of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from . import formats
from .base import RootFreeOptimizer
from .checkpoint import saved_group
from .checkpoint_checks import check_state_dict
from .groups import Group
from .state import unused_state


class Entry(NamedTuple):
    """A parameter of ours with its group, and its position, group and state in the source."""

    param: Tensor
    own: Group
    position: int
    group: Mapping[str, Any]
    state: Mapping[str, Any]


class Converted(NamedTuple):
    settings: Group
    state: Mapping[str, Any]


def state_dict_of(source: Optimizer | Mapping[str, Any]) -> Mapping[str, Any]:
    saved = source if isinstance(source, Mapping) else source.state_dict()
    check_state_dict(saved)
    return saved


def entries_of(
    source: Optimizer | Mapping[str, Any], saved: Mapping[str, Any], optimizer: Optimizer
) -> list[Entry]:
    """Each parameter of `optimizer` with what the source has of it."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("combine", "none") != "none":
            raise ValueError(
                f"combine of group {index} is {group['combine']!r}, but no source joins parameters "
                "as it does; build the optimizer with combine='none'"
            )
    owned = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    theirs = [(key, group) for group in saved["param_groups"] for key in group["params"]]
    if len(owned) != len(theirs):
        raise ValueError(
            f"the source has {len(theirs)} parameters but the optimizer has {len(owned)}; build it "
            "with the same parameters, in the same order"
        )
    positions: Sequence[int] = range(len(owned))
    if isinstance(source, Optimizer):
        params = chain.from_iterable(group["params"] for group in source.param_groups)
        found: dict[Tensor, int] = {param: i for i, param in enumerate(params)}
        if any(param not in found for param, _ in owned):
            raise ValueError(
                "the source has other parameters than the optimizer; build it with those of the "
                "source, or pass the source's state_dict() where they come in the same order"
            )
        positions = [found[param] for param, _ in owned]
    return [
        Entry(param, group, i, theirs[i][1], saved["state"].get(theirs[i][0], {}))
        for (param, group), i in zip(owned, positions, strict=True)
    ]


def assembled(optimizer: RootFreeOptimizer, converted: Sequence[Converted]) -> dict[str, Any]:
    """A state_dict of `optimizer`; state that the source does not have is as it starts."""
    groups: list[Group] = []
    states: dict[int, Mapping[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        positions = range(len(states), len(states) + len(group["params"]))
        settings = converted[positions[0]].settings if positions else {}
        merged = {**group, **settings}
        if "initial_square_avg" in group:
            merged["initial_square_avg"] = 1.0  # as they start
        unused = unused_state(merged)
        for position, param in zip(positions, group["params"], strict=True):
            _check_same(index, positions[0], settings, position, converted[position].settings)
            spec = optimizer._full_spec(param, merged)
            initial = {k: start(param.device) for k, start in spec.items() if k not in unused}
            state = {**initial, **converted[position].state}
            if formats.are_used(group):
                state = formats.sent(formats.converted(state, spec, param.device))
            states[position] = {key: value for key, value in state.items() if key in spec}
        groups.append({**saved_group(merged), "params": list(positions)})
    return {"state": states, "param_groups": groups}


def _check_same(index: int, first: int, settings: Group, position: int, others: Group) -> None:
    for key in settings.keys() | others.keys():
        if settings.get(key) != others.get(key):
            raise ValueError(
                f"parameters {first} and {position} of group {index} had {key} {settings.get(key)} "
                f"and {others.get(key)} in the source; build the optimizer with a group for each"
            )
