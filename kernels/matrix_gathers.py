"""The operands of IF-Shampoo's launches: axes of buckets, and what the gather copies of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrix_axes import PanelledAxis, moved
from .matrix_plan import (
    MatrixBucket,
    PlanDraft,
    Stack,
    addresses_of,
    grid_of,
    starts_aligned,
    triangle_of,
)
from .slots import GATHERED, LAYOUT, STRUCTURE, Column, Gather, padded

# Tiles of the gather launch: rows are contiguous, so a warp reads 256 or 512 bytes of one.
GATHER_ROWS, GATHER_COLUMNS = 64, 128


class Axis(PanelledAxis):
    """An axis of a bucket; its operands are columns of addresses, zero where there is nothing."""

    spill: Column = 0  # room for the tiles of its launches, where rows are not aligned
    squares: Column = 0  # partial ||factor||_F^2, of its blocks one after the other
    squares_count = 0
    norms: Column = 0  # partial ||m||_F^2, as squares
    norms_count = 0  # of what bounds a step
    nonzeros: Column = 0  # partial counts of the gradient's elements other than 0
    nonzeros_count = 0

    def __init__(self, size: int, stack: Tensor, aligned: bool, state: Sequence[Tensor]) -> None:
        super().__init__(size, stack)
        self.aligned = aligned
        self.factor, self.residual, self.momentum, self.product = state
        self.old = self.new = self.factor  # for GEMMs to read, before and after the update
        self.momentum_operand, self.product_operand = self.momentum, self.product

    @property
    def scale(self) -> Tensor:
        return torch.zeros_like(self.factor) if self.dense else self.factor

    @property
    def copied(self) -> bool:
        return self.dense and not self.aligned

    @property
    def structure(self) -> int:
        if not self.dense:
            return STRUCTURE.diagonal
        return STRUCTURE.aligned if self.aligned else STRUCTURE.ragged


class GatherDraft(PlanDraft):
    """A plan, and what of buckets the gather copies into the scratch."""

    number: int  # of the bucket that is being added
    stacked: bool

    def __init__(self, dtype: torch.dtype, block: int, update: bool, products: bool) -> None:
        super().__init__()
        self.dtype, self.block = dtype, block
        self.update, self.products = update, products

    def stack(self, scratch: Tensor, rows: int, columns: int) -> Stack:
        """Operands in the scratch."""
        return Stack(self.number, -1 - int(scratch[0]), (len(scratch), rows, columns))

    def state(self, name: str, n: int, axis: Axis) -> Stack:
        """Operands of axis n in the state."""
        return Stack(self.number, (name, n), (len(axis.factor), axis.size, axis.size))

    def join_gathers(self) -> None:
        """Copies of state, which need no dtype, go with a launch on gradients."""
        copies = self.entries.pop(("gather", None, ()), [])
        first = next(key for key in self.entries if key[0] == "gather")
        self.entries[first] += copies

    def axis(self, bucket: MatrixBucket, n: int) -> Axis:
        """The operands of an axis, and the copies that they need."""
        count, block = len(bucket.indices), bucket.blocks[n]
        stacks = bucket.factors[n], bucket.residuals[n], bucket.momenta[n], bucket.products[n]
        aligned = block % LAYOUT.row_multiple == 0 and all(map(starts_aligned, stacks))
        state = [addresses_of(stack, count) for stack in stacks]
        axis = Axis(bucket.sizes[n], bucket.factors[n], aligned, state)

        def copy(itemsize: int = self.dtype.itemsize) -> Tensor:
            return self.scratch(count, len(axis.panels) * block * padded(block), itemsize)

        if axis.copied:
            axis.product_operand = copy()
            if self.products:
                axis.new, axis.spill = copy(), copy(itemsize=4)
            if self.update:
                axis.momentum_operand = copy()
            elif self.products:
                self.gather_state(axis.factor, axis.new, axis)
            else:
                self.gather_state(axis.product, axis.product_operand, axis)
        if self.update:
            grid = self.factor_grid(axis)
            axis.norms_count = len(grid) * (len(axis.panels) if bucket.joint_norms[n] else 1)
            axis.norms = self.scratch(count, len(grid) * len(axis.panels), 4)
        if self.update and axis.dense:
            axis.old = copy()
            tiles = len(grid_of(block, block, GATHER_ROWS, GATHER_COLUMNS))
            axis.squares_count = tiles * len(axis.panels)
            axis.squares = self.scratch(count, axis.squares_count, 4)
            self.gather_state(axis.factor, axis.old, axis, axis.squares)
        return axis

    def factor_grid(self, axis: Axis) -> Tensor:
        """The tiles of m of a block, or of a diagonal one."""
        if axis.dense:
            return triangle_of(axis.block, self.block)
        return grid_of(axis.size, 1, self.block, self.block)

    def gather_state(self, source: Tensor, target: Tensor, axis: Axis, squares: Column = 0) -> None:
        d, itemsize = axis.block, self.dtype.itemsize
        tiles = len(grid_of(d, d, GATHER_ROWS, GATHER_COLUMNS))
        for panel in axis.panels:
            row = Gather(
                source=axis.square(source, panel, itemsize),
                target=axis.square(target, panel, itemsize),
                rows=d,
                columns=d,
                target_rows=d,
                target_columns=d,
                sums=moved(squares, 4 * tiles * panel.index),
                gathered=GATHERED.state,
                aligned=int(axis.aligned),
            )
            self.gather(row, None)

    def gather(self, row: Gather, dtype: torch.dtype | None) -> None:
        grid = grid_of(row.target_rows, row.target_columns, GATHER_ROWS, GATHER_COLUMNS)
        self.job("gather", 0, grid, row, dtype=dtype)
