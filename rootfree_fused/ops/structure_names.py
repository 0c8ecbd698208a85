"""The names of structures that a setting takes: ours, and singd's."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

Name = Literal[
    "auto",
    "dense",
    "diagonal",
    "dense_or_diagonal",
    "block",
    "hierarchical",
    "lower_toeplitz",
    "upper_toeplitz",
]
NAMES: tuple[Name, ...] = get_args(Name)
# Of the names of singd that are not ours already: patterns, with the numbers that they bring.
_ALIASES = (
    (re.compile(r"block([1-9]\d*)diagonal"), "block"),
    (re.compile(r"hierarchical(\d+)_(\d+)"), "hierarchical"),
    (re.compile("triltoeplitz"), "lower_toeplitz"),
    (re.compile("triutoeplitz"), "upper_toeplitz"),
)
ALIASES = "block30diagonal, hierarchical15_15, triltoeplitz and triutoeplitz"


def read(name: Any) -> tuple[str, tuple[int, ...]] | None:
    """Which of `NAMES` a name means, and the numbers in an alias; None for any other value."""
    if not isinstance(name, str):
        return None
    if name in NAMES:
        return name, ()
    for pattern, meaning in _ALIASES:
        if found := pattern.fullmatch(name):
            numbers = tuple(map(int, found.groups()))
            return (meaning, numbers) if not numbers or any(numbers) else None
    return None
