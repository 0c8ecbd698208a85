"""An axis of a bucket of matrices: whole, or cut into panels that each have a block of its factor.

A block is a job of its own, as a matrix of a bucket is. Matrices in the scratch whose axes have
blocks are padded with zeros to whole blocks, and so is the factor: a product reads no more than
that, and what it makes of padding is zero too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .slots import LAYOUT, Column, padded


class Panel(NamedTuple):
    """The rows or columns of a matrix that a block of a factor multiplies."""

    index: int
    first: int  # elements before it
    live: int  # elements of the axis in it; the rest of the block is padding


class PanelledAxis:
    """The panels of an axis of `size` elements, one where its factor has no blocks.

    stack: of the factors, as the operators take it.
    """

    def __init__(self, size: int, stack: Tensor) -> None:
        self.size, self.dense = size, stack.dim() > 2
        self.block = stack.shape[-1] if self.dense else size
        starts = range(0, size, self.block)
        self.panels = [Panel(i, k, min(self.block, size - k)) for i, k in enumerate(starts)]

    @property
    def has_blocks(self) -> bool:
        return len(self.panels) > 1

    @property
    def extent(self) -> int:
        """The elements of all panels, padding included."""
        return self.size if len(self.panels) == 1 else len(self.panels) * self.block

    def square(self, column: Column, panel: Panel, itemsize: int) -> Column:
        """Where the block of a panel is, of (block, block) matrices that lie together."""
        return moved(column, panel.index * self.block * padded(self.block) * itemsize)

    def tiles(self, block: int) -> int:
        """How many tiles of this many elements all panels have."""
        return len(self.panels) * -(-self.block // block)


def moved(column: Column, nbytes: int) -> Column:
    """Addresses so many bytes further on; those of the scratch are -1 - a byte, and 0 is none."""
    if not isinstance(column, Tensor) or nbytes == 0:
        return column
    return torch.where(column < 0, column - nbytes, torch.where(column > 0, column + nbytes, 0))


def serves(stacks: Sequence[Tensor]) -> bool:
    """Whether kernels take the blocks of these factors: their rows start on 16 bytes."""
    return all(stack.dim() < 4 or stack.shape[-1] % LAYOUT.row_multiple == 0 for stack in stacks)
