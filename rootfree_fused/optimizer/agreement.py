"""Whether ranks step on the same: what they tell each other, and what is said where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import HYPERPARAMETERS
from .amp_and_graphs import Scaling
from .groups import Group, devices_of

# Of a header: this rank takes no step; its parameters are others than those that were agreed on.
FAULT, ANEW = 1, 2
LACKING = "parameters without a gradient"
COUNTS = "steps of parameters"
STEPS = "steps that this optimizer began"
Told = list[dict[str, Any]]
_CURES = {
    LACKING: "give all ranks a gradient, zeros if there is none, or no rank",
    COUNTS: "start its state anew on all with optimizer.state.pop(param), or load a checkpoint",
}


def told(
    groups: Sequence[Group],
    shared: Container[int],
    states: dict[Any, Any],
    steps: int,
    scaling: Scaling,
) -> Told:
    """Of each group what must be the same on all ranks.

    shared: by their ids, the parameters of which several ranks must have a gradient, or none.
    states: of the parameters, whose counts tell a state that started anew, and which factors are
    updated. steps: how many this optimizer began, since a rank that left one out is a step behind.
    """
    found = bool(scaling["found_inf"].item()) if "found_inf" in scaling else False
    return [
        {
            **{key: _plain(group[key]) for key in sorted(HYPERPARAMETERS & group.keys())},
            LACKING: [
                _short_name(i, group)
                for i, p in enumerate(group["params"])
                if id(p) in shared and p.grad is None
            ],
            COUNTS: {
                i: _count_of(dict.get(states, p))
                for i, p in enumerate(group["params"])
                if id(p) in shared and may_read
            },
            "found_inf": found,
            STEPS: steps,
        }
        for group in groups
        for may_read in [_may_read_counts(group, shared)]
    ]


def _may_read_counts(group: Group, shared: Container[int]) -> bool:
    """Whether no step waits for a device to read them, unless they decide what is updated."""
    first = next((p for p in group["params"] if id(p) in shared), None)
    if first is None or group["update_interval"] > 1:
        return True
    return devices_of(["step"], first, group)["step"].type == "cpu"


def _count_of(state: Mapping[str, Any] | None) -> float | None:
    """0 of state that is not allocated yet; None of what is no count, which its rank refuses."""
    count = state.get("step", 0.0) if state else 0.0
    if isinstance(count, Tensor):
        return count.item() if count.numel() == 1 and not count.is_meta else None
    return count if isinstance(count, float) else None


def _short_name(position: int, group: Group) -> int | str:
    """What messages call a parameter of a group that they name."""
    names = group.get("param_names", ())
    return names[position] if position < len(names) else position


def _plain(value: Any) -> Any:
    """A setting as equal ones are written alike; a tensor of a device is not read."""
    if isinstance(value, Tensor):
        return value.item() if value.is_cpu and value.numel() == 1 else None
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, (bool, str, torch.dtype)) else None


def word_of(what: Told) -> int:
    """64 bits that tell it."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_told(everyones: list[list[str]]) -> None:
    """Raise a RuntimeError where ranks do not have the same matrices."""
    first = everyones[0]
    for rank, own in enumerate(everyones):
        if own != first:
            pairs = zip_longest(first, own, fillvalue="nothing")
            one, other = next((a, b) for a, b in pairs if a != b)
            raise RuntimeError(
                f"rank 0 has {one} where rank {rank} of the {len(everyones)} that share it has "
                f"{other}; give all ranks the same parameters in the same order, and the same "
                "settings"
            )


def trouble_of(everyones: Sequence[tuple[str | None, bool, Told]]) -> str | None:
    """What differs between the ranks: of each its fault, whether it has others, what it told."""
    for rank, (fault, _, _) in enumerate(everyones):
        if fault is not None:
            return f"rank {rank} took no step ({fault}), so nothing was changed on any rank"
    anew = [rank for rank, (_, others, _) in enumerate(everyones) if others]
    if 0 < len(anew) < len(everyones):
        return (
            f"rank {anew[0]} of the {len(everyones)} that share matrices has other parameters that "
            "train, or other groups, than at the last step, and others have not; nothing was "
            "changed on any rank: change them on all"
        )
    first = everyones[0][2]
    for rank, (_, _, own) in enumerate(everyones):
        for index, (one, other) in enumerate(zip(first, own, strict=False)):
            for key in one:
                if one[key] != other.get(key):
                    what, of_first, of_other = _difference(key, one[key], other.get(key))
                    return (
                        f"{what} of group {index} is {of_first} on rank 0 and {of_other} on "
                        f"rank {rank} of those that share its matrices; nothing was changed on any "
                        f"rank: {_CURES.get(key, 'make it the same on all')}"
                    )
    return None


def _difference(key: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """What differs, and how: of counts the first that does."""
    if key != COUNTS or not isinstance(other, dict):
        return key, one, other
    at = next(i for i in [*one, *other] if one.get(i) != other.get(i))
    return f"step of parameter {at}", one.get(at), other.get(at)
