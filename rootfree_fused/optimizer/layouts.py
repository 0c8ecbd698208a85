"""How a parameter is seen: which axes it has, and the structure of each axis' factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ops import structure_names
from ..reference.compact_structures import Hierarchical, Toeplitz
from ..reference.structures import DENSE, DIAGONAL, Blocks, Structure

# How many times max_dense_dim an axis may have to get blocks from "auto".
LARGEST_IN_BLOCKS = 16
# What "block" and "hierarchical" have unless it is set: two tiles of a GEMM, and as released.
BLOCK_SIZE, HIERARCHICAL_SIZES = 256, (15, 15)
# What block sizes are multiples of: how deep the C++ kernel packs where the limit is a multiple
# of it too, else 16 bytes of each dtype and a tile of any unit of products.
BLOCK_MULTIPLES = (32, 16, 1)


@dataclass(frozen=True)
class Layout:
    """How a parameter, or each member, is seen: the sizes of axes, their factors' structures."""

    sizes: tuple[int, ...]
    structures: tuple[Structure, ...]

    @property
    def in_kernels(self) -> bool:
        """Whether the shapes of factors tell their structures, as the operators need it."""
        return not any(isinstance(s, (Hierarchical, Toeplitz)) for s in self.structures)

    @property
    def has_diagonal_rows(self) -> bool:
        """Whether the first of several axes has a diagonal factor."""
        return len(self.sizes) > 1 and self.structures[0] is DIAGONAL


def layout_of(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """The axes of a parameter, or of each of its members, or None for one without factors.

    Axes of size 1 are dropped; a scalar is a vector of 1. With merge_axes, three axes or more are
    seen as the matrix (first axis, all others), or axes are merged as it names them.

    Raises:
        ValueError: the group's structures, batch_axes or merge_axes do not fit the shape.
    """
    merge = group.get("merge_axes", True)
    merged = [shape[i] for i in range(batch_axes_of(shape, group), len(shape))]
    if isinstance(merge, tuple):
        merged = _merged(shape, merged, merge)
    sizes = tuple(d for d in merged if d != 1) or (1,)
    if math.prod(shape) == 0 or (len(sizes) == 1 and group["vector_method"] != "factor"):
        return None
    if merge is True and len(sizes) > 2:
        sizes = (sizes[0], math.prod(sizes[1:]))
    structures = group["structures"]
    if isinstance(structures, str):
        structures = (structures,) * len(sizes)
    elif len(structures) != len(sizes):
        raise ValueError(
            f"structures is {structures!r}, of length {len(structures)}, but a parameter of shape "
            f"{tuple(shape)} has the axes {sizes}; pass one structure an axis, or one for all"
        )
    axes = zip(structures, sizes, strict=True)
    return Layout(sizes, tuple(_structure(name, size, shape, group) for name, size in axes))


def names_in(structures: str | Sequence[str]) -> set[str]:
    """Which of `structure_names.NAMES` a setting means."""
    names = (structures,) if isinstance(structures, str) else structures
    return {read[0] for name in names if (read := structure_names.read(name))}


def _structure(name: str, size: int, shape: Sequence[int], group: Mapping[str, Any]) -> Structure:
    """The structure of this name for an axis of this size."""
    read = structure_names.read(name)
    assert read is not None, "settings are checked"
    kind, numbers = read
    limit = group["max_dense_dim"]
    if kind == "auto":
        return automatic(size, limit)
    if kind == "dense_or_diagonal":
        return DENSE if size <= limit else DIAGONAL
    if kind in ("dense", "block"):
        side = size
        if kind == "block":
            side = min(size, numbers[0] if numbers else group["block_size"])
        if side > limit:
            raise ValueError(
                f"structures is {group['structures']!r} but a parameter of shape {tuple(shape)} "
                f"has an axis of {size}, of which {side} would be dense, above max_dense_dim="
                f"{limit}: its factor would take {6 * size * side / 2**30:.3g} GiB; pass 'block', "
                "'auto' or 'diagonal', a block_size within it, or a larger max_dense_dim"
            )
        return DENSE if side == size else Blocks(side, joint_norm=True)
    if kind == "hierarchical":
        return Hierarchical(size, *(numbers or group["hierarchical_sizes"]))
    return DIAGONAL if kind == "diagonal" else Toeplitz(lower=kind == "lower_toeplitz")


def automatic(size: int, limit: int) -> Structure:
    """Dense up to a limit, in as few equal blocks up to 16 of it, diagonal above."""
    if size <= limit:
        return DENSE
    if size > LARGEST_IN_BLOCKS * limit:
        return DIAGONAL
    unit = next(n for n in BLOCK_MULTIPLES if limit % n == 0 or (n == 16 and limit > 16))
    largest = limit // unit * unit
    least = -(-size // -(-size // largest))
    return Blocks(-(-least // unit) * unit)


def batch_axes_of(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    """How many of the first axes of a parameter of this shape number members."""
    count: int = group.get("batch_axes", 0)
    if count and count >= len(shape):
        allowed = " or ".join(map(str, range(max(len(shape), 1))))
        apart = "" if len(shape) > 1 else ", in a group of its own"
        raise ValueError(
            f"batch_axes={count} leaves a parameter of shape {tuple(shape)} no axis; "
            f"pass {allowed}{apart}"
        )
    return count


def _merged(
    shape: Sequence[int], sizes: Sequence[int], sets: tuple[tuple[int, ...], ...]
) -> list[int]:
    """The sizes of a parameter's axes, or a member's, with those of a set as one."""
    if [axis for axes in sets for axis in axes] != list(range(len(sizes))):
        behind = " behind its batch axes" if len(sizes) < len(shape) else ""
        raise ValueError(
            f"merge_axes is {sets!r} but a parameter of shape {tuple(shape)} has {len(sizes)} axes"
            f"{behind}; name them from 0 on, each once, in order, or put it into another group"
        )
    return [math.prod(sizes[axis] for axis in axes) for axes in sets]
