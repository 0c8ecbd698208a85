"""What to read in lines of SASS: widths of accesses, tensor-core instructions, conversions."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|ATOMG|UTMALDG|UTMASTG)\.\S*")

LOCAL_MEMORY = r"\b(LDL|STL)\b"
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA)\b")
FLOAT32_PRODUCT = re.compile(r"\bFFMA2?\b")
CONVERSION = re.compile(r"\b(F2FP?|F2I\w*|I2FP?)\.")
# The instruction that makes an address 64 bits wide: a product or sum of 64 bits, or the half of a
# sum that takes the carry.
WIDE_ADDRESS = re.compile(r"\bU?(IMAD\.WIDE|IADD3?\.64|(IADD3|IMAD|LEA\.HI)\.X)\b")


def access_bytes(line: str) -> int | None:
    """Bytes a thread of a global access, None for anything else; a copy by TMA counts as 16."""
    match = _ACCESS.search(line)
    if match is None:
        return None
    if match[0].startswith("UTMA"):
        return 16
    width = _WIDTH.search(match[0])
    return _BYTES[width[1]] if width else 4


def widths(path: Iterable[str], operation: str) -> dict[int, int]:
    """How many global accesses ("LDG" or "STG") of each width in bytes a path has."""
    counts: dict[int, int] = {}
    for line in path:
        if re.search(rf"\b{operation}\.E", line):
            size = access_bytes(line)
            assert size is not None
            counts[size] = counts.get(size, 0) + 1
    return counts


def count(path: Iterable[str], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.search(line)) for line in path)


def tensor_cores(path: Iterable[str]) -> list[str]:
    """The tensor-core operations of a path, each once."""
    found = [TENSOR_CORE.search(line) for line in path]
    return sorted({match[1] for match in found if match})


def first_index(path: list[str], pattern: str) -> int:
    return next((i for i, line in enumerate(path) if re.search(pattern, line)), len(path))


def last_index(path: list[str], pattern: str) -> int:
    return max((i for i, line in enumerate(path) if re.search(pattern, line)), default=-1)
