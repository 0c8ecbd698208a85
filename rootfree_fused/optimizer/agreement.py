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
from .groups import Group

# Of a header: this rank takes no step; its parameters are others than those that were agreed on.
FAULT, ANEW = 1, 2
LACKING = "parameters without a gradient"
COUNTS = "steps of matrices whose rows stay"
STEPS = "steps that this optimizer began"
Told = list[dict[str, Any]]


def told(
    groups: Sequence[Group],
    shared: Container[int],
    counts: Mapping[int, Tensor | None],
    steps: int,
    scaling: Scaling,
) -> Told:
    """Of each group what must be the same on all ranks.

    shared: by their ids, the parameters of which several ranks must have a gradient, or none.
    counts: by their ids, the step counts of those whose rows stay, by which all ranks sum grams, or
    none. steps: how many this optimizer began, since a rank that left one out is a step behind.
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
            COUNTS: [
                count.item()
                for p in group["params"]
                if group["update_interval"] > 1 and (count := counts.get(id(p))) is not None
            ],
            "found_inf": found,
            STEPS: steps,
        }
        for group in groups
    ]


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
                    cure = "give all ranks a gradient, zeros if there is none, or no rank"
                    return (
                        f"{key} of group {index} is {one[key]} on rank 0 and {other.get(key)} on "
                        f"rank {rank} of those that share its matrices; nothing was changed on any "
                        f"rank: {cure if key == LACKING else 'make it the same on all'}"
                    )
    return None
