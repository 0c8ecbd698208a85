"""The paths through machine code: loops, the main path, and which accesses are of elements.

An access is of elements where its address depends on the thread, or where it is a copy by the
tensor memory accelerator; the others read tables and scalars, one address for all threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from .instructions import FLOAT32_PRODUCT, TENSOR_CORE, access_bytes, count

# Weights that choose the main path: turns of a loop, and what a loop of products outweighs.
_TURNS = 16
_PRODUCTS = 10**6
_FEWEST_FLOAT32_PRODUCTS = 64  # of a loop that multiplies matrices; an epilogue has fewer

_GUARD = re.compile(r"@!?(U?P\d+) ")
_REGISTER = re.compile(r"\b(U?R|U?P)(\d+)(?:\.reuse)?(\.64)?")
# A loop may be left by a call of what follows it, without a return.
_BRANCH = re.compile(r"(?:@\S+ )?(?:BRA|CALL)\b.*`\((\.L_\w+)\)")
_LEAVES = re.compile(r"(@\S+ )?(BRA|CALL|EXIT|RET)\b")
_THREAD = re.compile(r"SR_(TID|LANEID|LTMASK)|^(LDS|LDSM|SHFL|VOTE|MATCH|LDL)\b")
_NO_RESULT = re.compile(r"^(ST|LDGSTS|RED|BRA|BSSY|BSYNC|BAR|EXIT|UTMA|WARPSYNC|CALL|RET)")
_RESULT_WORDS = {".64": 2, ".WIDE": 2, ".128": 4}


class _Instruction(NamedTuple):
    results: frozenset[str]
    sources: frozenset[str]
    guarded: bool
    from_thread: bool


class _Access(NamedTuple):
    size: int
    is_store: bool


def _registers(text: str) -> frozenset[str]:
    found = _REGISTER.findall(text)
    pairs = [(kind, int(index) + i) for kind, index, wide in found for i in range(1 + bool(wide))]
    return frozenset(f"{kind}{index}" for kind, index in pairs)


def _parsed(line: str) -> _Instruction:
    guard = _GUARD.match(line)
    line = line[guard.end() :] if guard else line
    operation, _, text = line.rstrip(" ;").partition(" ")
    operands = text.split(", ")
    results: frozenset[str] = frozenset()
    if not _NO_RESULT.match(operation):
        results = _registers(operands[0])
        words = 2 if operation.startswith("CS2R") else 1
        words = max([words, *(n for key, n in _RESULT_WORDS.items() if key in operation)])
        if match := re.fullmatch(r"(U?R)(\d+)(?:\.64)?", operands[0]):
            results = frozenset(f"{match[1]}{int(match[2]) + i}" for i in range(words))
        operands = operands[1:]
        while operands and re.fullmatch(r"U?P(\d+|T)", operands[0]):
            results |= _registers(operands.pop(0))
    sources = _registers(", ".join(operands))
    if guard:
        sources |= {guard[1]}
    return _Instruction(results, sources, bool(guard), bool(_THREAD.search(line)))


def _address(line: str) -> frozenset[str]:
    """The registers of the last bracket: that of the global address."""
    return _registers(re.findall(r"\[([^\]]*)\]", line)[-1])


class ControlFlow:
    """Blocks of instructions that run together, and which block may follow which."""

    def __init__(self, lines: list[str]) -> None:
        self.blocks: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        for line in lines:
            if line.endswith(":"):
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[line[:-1]] = len(self.blocks) - 1
                continue
            self.blocks[-1].append(line)
            if _LEAVES.match(line):
                self.blocks.append([])
        if not self.blocks[-1]:
            self.blocks.pop()
        self.successors = [self._after(i, labels) for i in range(len(self.blocks))]

    def _after(self, i: int, labels: dict[str, int]) -> list[int]:
        last = self.blocks[i][-1]
        following = [i + 1] if i + 1 < len(self.blocks) else []
        if re.match(r"(EXIT|RET)\b", last):
            return []
        if match := _BRANCH.match(last):
            target = [labels[match[1]]]
            # Without a guard or a condition before the label it always branches.
            return target if re.match(r"\S+ `", last) else target + following
        return following

    @cached_property
    def _reach(self) -> list[int]:
        """For each block the blocks that may run after it, as bits."""
        reach, changed = [0] * len(self.blocks), True
        while changed:
            changed = False
            for i in reversed(range(len(self.blocks))):
                after = reach[i]
                for j in self.successors[i]:
                    after |= reach[j] | 1 << j
                changed |= after != reach[i]
                reach[i] = after
        return reach

    def _group(self, i: int) -> tuple[int, ...]:
        """The block alone, or the loop that it is in."""
        reach = self._reach
        return tuple([j for j, r in enumerate(reach) if reach[i] >> j & r >> i & 1]) or (i,)

    @cached_property
    def loops(self) -> list[list[str]]:
        groups = {self._group(i) for i, after in enumerate(self._reach) if after >> i & 1}
        return [[line for i in group for line in self.blocks[i]] for group in sorted(groups)]

    @property
    def main_loop(self) -> list[str]:
        """The loop with the most products; empty where no loop multiplies matrices."""
        return max(self.loops, key=_products, default=[]) if any(map(_products, self.loops)) else []

    @cached_property
    def _accesses(self) -> list[list[_Access]]:
        """The accesses of elements of each block."""
        parsed = [[_parsed(line) for line in block] for block in self.blocks]
        before: list[frozenset[str] | None] = [None] * len(self.blocks)
        before[0], work = frozenset(), {0}
        while work:
            i = work.pop()
            after = before[i] or frozenset()
            for instruction in parsed[i]:
                after = _depending(instruction, after)
            for j in self.successors[i]:
                known = before[j]
                if known is None or not after <= known:
                    before[j] = after | (known or frozenset())
                    work.add(j)
        return [list(self._found(i, parsed[i], before[i])) for i in range(len(self.blocks))]

    def _found(
        self, i: int, parsed: list[_Instruction], dependent: frozenset[str] | None
    ) -> Iterator[_Access]:
        if dependent is None:  # never reached
            return
        for line, instruction in zip(self.blocks[i], parsed, strict=True):
            size = access_bytes(line)
            if size is not None and ("UTMA" in line or _address(line) & dependent):
                yield _Access(size, bool(re.search(r"\b(STG|UTMASTG)\b", line)))
            dependent = _depending(instruction, dependent)

    @cached_property
    def main_blocks(self) -> list[int]:
        """The blocks that aligned matrices and full chunks go through.

        Of the paths through the code past the most loops of products, the one that stores the most
        elements 16 bytes at a time and makes the fewest narrower accesses, one of a loop counted
        16 times; of equal ones the shortest.
        """
        groups = {self._group(i) for i in range(len(self.blocks))}
        where = {i: group for group in groups for i in group}
        best: dict[tuple[int, ...], tuple[int, int, list[int]]] = {}
        # What a group leads to reaches fewer blocks than it does.
        for group in sorted(groups, key=lambda g: (self._reach[g[0]] | 1 << g[0]).bit_count()):
            after = {where[j] for i in group for j in self.successors[i]} - {group}
            ways = [best[g] for g in after]
            if not ways or any(map(self._may_end, group)):
                ways.append((0, 0, []))
            weight, size, path = max(ways)
            weight += self._weight(group)
            size -= sum(len(self.blocks[i]) for i in group)
            best[group] = weight, size, [*group, *path]
        return best[where[0]][2]

    def _may_end(self, i: int) -> bool:
        """Whether a block is a path of full chunks, which then leaves what else follows it."""
        stores = [access.size for access in self._accesses[i] if access.is_store]
        wide = bool(stores) and min(stores) >= 16
        return wide and bool(re.match(r"@\S+ EXIT\b", self.blocks[i][-1]))

    def _weight(self, group: tuple[int, ...]) -> int:
        accesses = [access for i in group for access in self._accesses[i]]
        weight = sum(access.is_store if access.size >= 16 else -1 for access in accesses)
        if self._reach[group[0]] >> group[0] & 1:
            lines = [line for i in group for line in self.blocks[i]]
            weight = _TURNS * weight + _PRODUCTS * bool(_products(lines))
        return weight

    @property
    def main_path(self) -> list[str]:
        return [line for i in self.main_blocks for line in self.blocks[i]]

    @property
    def wide_share(self) -> float:
        """Of the main path's accesses of elements, those of at least 16 bytes or by TMA."""
        sizes = [access.size for i in self.main_blocks for access in self._accesses[i]]
        return sum(size >= 16 for size in sizes) / len(sizes)


def _products(loop: list[str]) -> int:
    if tensor_core := count(loop, TENSOR_CORE):
        return tensor_core
    products = count(loop, FLOAT32_PRODUCT)
    return products if products >= _FEWEST_FLOAT32_PRODUCTS else 0


def _depending(instruction: _Instruction, dependent: frozenset[str]) -> frozenset[str]:
    """The registers that depend on the thread after an instruction."""
    if instruction.from_thread or instruction.sources & dependent:
        return dependent | instruction.results
    return dependent if instruction.guarded else dependent - instruction.results
