"""Whether ranks step on the same: what they tell each other, and what is said where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from .groups import Group

LACKING = "parameters without a gradient"


def word_of(groups: Sequence[Group]) -> int:
    """64 bits that tell the settings of a step, and which parameters have a gradient."""
    digest = hashlib.sha256(repr(settings_told(groups)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def settings_told(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Of each group the settings that are no tensors, and which parameters lack a gradient."""
    return [
        {
            **{key: value for key, value in group.items() if _is_told(key, value)},
            LACKING: [i for i, p in enumerate(group["params"]) if _lacks_gradient(p)],
        }
        for group in groups
    ]


def _lacks_gradient(param: Any) -> bool:
    return getattr(param, "grad", None) is None


def _is_told(key: str, value: Any) -> bool:
    return key not in ("params", "param_names") and isinstance(value, (int, float, str, tuple))


def check_told(everyones: list[list[str]]) -> None:
    first = everyones[0]
    for rank, told in enumerate(everyones):
        if told != first:
            pairs = zip_longest(first, told, fillvalue="nothing")
            one, other = next((a, b) for a, b in pairs if a != b)
            raise RuntimeError(
                f"rank 0 has {one} where rank {rank} of the {len(everyones)} that share it has "
                f"{other}; give all ranks the same parameters in the same order, and the same "
                "settings"
            )


def trouble_of(everyones: list[tuple[str | None, list[dict[str, Any]]]]) -> str:
    """What differs between the ranks."""
    for rank, (fault, _) in enumerate(everyones):
        if fault is not None:
            return f"rank {rank} took no step ({fault}), so nothing was changed on any rank"
    first = everyones[0][1]
    for rank, (_, state) in enumerate(everyones):
        for index, (one, other) in enumerate(zip(first, state, strict=False)):
            for key in one:
                if one[key] != other.get(key):
                    return (
                        f"{key} of group {index} is {one[key]} on rank 0 and {other.get(key)} on "
                        f"rank {rank} of those that share its matrices; nothing was changed on any "
                        "rank: make it the same on all"
                    )
    return "the ranks step on other groups; nothing was changed on any rank"
