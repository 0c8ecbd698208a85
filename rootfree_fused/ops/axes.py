"""The axes that a parameter's factors belong to, and their structures, as shapes tell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..reference.structures import Blocks, Structure, structure_of_stack


def sizes_of(shape: Sequence[int], stacks: Sequence[Tensor]) -> list[int] | None:
    """The sizes of a parameter's axes, neighbours merged, that have these stacks of factors.

    stacks: one an axis, (members, d), (members, d, d) or, for blocks, (members, n, b, b), whose
        axis has more than (n - 1) b elements and at most n b. None where none are its axes.
    """
    left = [size for size in shape if size != 1]
    sizes = []
    for stack in stacks:
        in_blocks = stack.dim() == 4
        largest = stack.shape[1] * stack.shape[2] if in_blocks else stack.shape[1]
        least = largest - stack.shape[2] + 1 if in_blocks else largest
        size = 1
        while left and size < least:
            size *= left.pop(0)
        if not least <= size <= largest:
            return None
        sizes.append(size)
    return None if left else sizes


def known_sizes(param: Tensor, stacks: Sequence[Tensor]) -> list[int]:
    """As `sizes_of`, of a parameter that was checked."""
    sizes = sizes_of(param.shape, stacks)
    assert sizes is not None, "the factors are not of this parameter"
    return sizes


def bucket_sizes(
    params: Sequence[Tensor], factors: Sequence[Tensor], axes: Sequence[int]
) -> list[list[int]]:
    """Of the axes of each bucket of a call; `axes` has how many those are."""
    found: list[list[int]] = []
    first = member = 0
    for count in axes:
        stacks = factors[first : first + count]
        found.append(known_sizes(params[member], stacks))
        first, member = first + count, member + len(stacks[0])
    return found


def structures_of(
    factors: Sequence[Tensor], joint_norms: Sequence[bool] | None, first: int, last: int
) -> list[Structure]:
    """Of the axes of a bucket, whose stacks of factors are `factors[first:last]`.

    joint_norms: of every axis of a call, whether its blocks are bounded by the norm of the factor.
    """
    found: list[Structure] = []
    for axis in range(first, last):
        structure = structure_of_stack(factors[axis])
        if isinstance(structure, Blocks) and joint_norms and joint_norms[axis]:
            structure = replace(structure, joint_norm=True)
        found.append(structure)
    return found
