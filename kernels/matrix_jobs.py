"""Which matrices each launch of IF-Shampoo computes, where their operands are, and in which order.

A plan depends on where the factor state lies, on shapes and on dtypes, never on the addresses of
parameters, gradients and momentum buffers: those are looked up by index in a table of their own.
Everything that lives for one step alone lies in one scratch allocation, at bytes that the plan
fixes; a job names them by -1 - byte, and anything else by address (kernels/slots.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrix_plan import (
    MatrixBucket,
    MatrixPlan,
    Operands,
    PlanDraft,
    Stack,
    Tiling,
    addresses_of,
    grid_of,
    starts_aligned,
    triangle_of,
)
from .slots import (
    GATHERED,
    LAYOUT,
    SIDE,
    STRUCTURE,
    Column,
    Factors,
    Gather,
    Momenta,
    Params,
    Product,
    Square,
    padded,
)

# Tiles of the gather launch: rows are contiguous, so a warp reads 256 or 512 bytes of one.
GATHER_ROWS, GATHER_COLUMNS = 64, 128


def build_plan(
    buckets: Sequence[MatrixBucket],
    stacked: Sequence[bool],
    dtype: torch.dtype,
    tiling: Tiling,
    device: torch.device,
    *,
    update: bool,
    refresh: bool,
) -> MatrixPlan:
    """The launches of one step: with new factors (update), or with new products alone (refresh).

    stacked: of each bucket, whether its factors and products are the stacked kernels'
    and its other products of two dense operands the vendor's; it must be aligned, with both
    factors dense.
    """
    builder = _Builder(dtype, tiling.block, update, update or refresh)
    for number, (bucket, is_stacked) in enumerate(zip(buckets, stacked, strict=True)):
        builder.add(bucket, number, is_stacked)
    builder.join_gathers()
    return builder.finish(device)


class _Axis:
    """An axis of a bucket; its operands are columns of addresses, zero where there is nothing."""

    spill: Column = 0  # room for the tiles of its launches, where rows are not aligned
    squares: Column = 0  # partial ||factor||_F^2
    squares_count = 0
    norms: Column = 0  # partial ||m||_F^2
    norms_count = 0
    nonzeros: Column = 0  # partial counts of the gradient's elements other than 0
    nonzeros_count = 0

    def __init__(self, size: int, dense: bool, aligned: bool, state: Sequence[Tensor]) -> None:
        self.size, self.dense, self.aligned = size, dense, aligned
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


class _Builder(PlanDraft):
    number: int  # of the bucket that is being added
    stacked: bool

    def __init__(self, dtype: torch.dtype, block: int, update: bool, products: bool) -> None:
        super().__init__()
        self.dtype, self.block = dtype, block
        self.update, self.products = update, products

    def stack(self, scratch: Tensor, rows: int, columns: int) -> Stack:
        """Operands in the scratch."""
        return Stack(self.number, -1 - int(scratch[0]), (len(scratch), rows, columns))

    def state(self, name: str, n: int, axis: _Axis) -> Stack:
        """Operands of axis n in the state."""
        return Stack(self.number, (name, n), (len(axis.factor), axis.size, axis.size))

    def add(self, bucket: MatrixBucket, number: int, stacked: bool) -> None:
        self.number, self.stacked = number, stacked
        axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        rows, columns = bucket.sizes
        count, neither = len(bucket.indices), not any(bucket.dense)
        itemsize = self.dtype.itemsize
        elements = rows * padded(columns)
        gradient = self.scratch(count, elements, 4 if neither else itemsize)
        nonzeros, nonzeros_count = torch.zeros(count, device="cpu", dtype=torch.int64), 0
        if self.update:
            nonzeros_count = len(grid_of(rows, columns, GATHER_ROWS, GATHER_COLUMNS))
            nonzeros = self.scratch(count, nonzeros_count, 4)
        for axis in axes:
            axis.nonzeros, axis.nonzeros_count = nonzeros, nonzeros_count
        for dtype in dict.fromkeys(bucket.grad_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.grad_dtypes], device="cpu")
            indices = torch.tensor(bucket.indices, device="cpu")[chosen]
            row = Gather(
                source=indices,
                target=gradient[chosen],
                rows=rows,
                columns=columns,
                sums=nonzeros[chosen],
                gathered=GATHERED.wide_gradient if neither else GATHERED.gradient,
                aligned=0,
            )
            self.gather(row, dtype)
        # T at an update, then V.
        left_product = self.scratch(count, elements, itemsize) if all(bucket.dense) else gradient
        if self.update:
            self.add_update(axes, gradient, left_product)
        if self.products:
            for n, axis in enumerate(axes):
                self.add_products(n, axis)
        self.add_step(bucket, axes, gradient, left_product)

    def join_gathers(self) -> None:
        """Copies of state, which need no dtype, go with a launch on gradients."""
        copies = self.entries.pop(("gather", None, ()), [])
        first = next(key for key in self.entries if key[0] == "gather")
        self.entries[first] += copies

    def axis(self, bucket: MatrixBucket, n: int) -> _Axis:
        """The operands of an axis, and the copies that they need."""
        size, dense, count = bucket.sizes[n], bucket.dense[n], len(bucket.indices)
        stacks = bucket.factors[n], bucket.residuals[n], bucket.momenta[n], bucket.products[n]
        aligned = size % LAYOUT.row_multiple == 0 and all(map(starts_aligned, stacks))
        axis = _Axis(size, dense, aligned, [addresses_of(stack, count) for stack in stacks])

        def copy(itemsize: int = self.dtype.itemsize) -> Tensor:
            return self.scratch(count, size * padded(size), itemsize)

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
            tiles = -(-size // self.block)
            axis.norms_count = tiles * (tiles + 1) // 2 if dense else tiles
            axis.norms = self.scratch(count, axis.norms_count, 4)
        if self.update and dense:
            axis.old = copy()
            axis.squares_count = len(grid_of(size, size, GATHER_ROWS, GATHER_COLUMNS))
            axis.squares = self.scratch(count, axis.squares_count, 4)
            self.gather_state(axis.factor, axis.old, axis, axis.squares)
        return axis

    def gather_state(
        self, source: Tensor, target: Tensor, axis: _Axis, squares: Column = 0
    ) -> None:
        row = Gather(
            source=source,
            target=target,
            rows=axis.size,
            columns=axis.size,
            sums=squares,
            gathered=GATHERED.state,
            aligned=int(axis.aligned),
        )
        self.gather(row, None)

    def gather(self, row: Gather, dtype: torch.dtype | None) -> None:
        grid = grid_of(row.rows, row.columns, GATHER_ROWS, GATHER_COLUMNS)
        self.job("gather", 0, grid, row, dtype=dtype)

    def add_update(self, axes: list[_Axis], gradient: Tensor, left_product: Tensor) -> None:
        left, right = axes
        rows, columns = left.size, right.size
        count, block = len(gradient), self.block
        grid = grid_of(rows, columns, block, block)
        across = [-(-axis.size // block) for axis in axes]
        # A diagonal factor's sums of squares of M: along rows from each tile column, or the other.
        sums = [
            0 if axis.dense else self.scratch(count, across[1 - n] * axis.size, 4)
            for n, axis in enumerate(axes)
        ]
        transformed = 0
        if left.dense or right.dense:
            transformed = self.scratch(count, rows * padded(columns), self.dtype.itemsize)
        if self.stacked:
            g, t, m = (self.stack(s, rows, columns) for s in (gradient, left_product, transformed))
            self.vendor("left", self.state("factors", 0, left), g, t, transposed=True)
            self.vendor("right", t, self.state("factors", 1, right), m)
        else:
            self.add_transformed(axes, grid, gradient, left_product, transformed, sums)
        for n, (axis, other) in enumerate(zip(axes, reversed(axes), strict=True)):
            if axis.dense:
                self.add_momentum(axis, other, transformed, columns, (SIDE.rows, SIDE.columns)[n])
            else:
                self.add_momentum(axis, other, sums[n], across[1 - n], SIDE.diagonal)
            self.add_factor(n, axis)

    def add_transformed(
        self,
        axes: list[_Axis],
        grid: Tensor,
        gradient: Tensor,
        left_product: Tensor,
        transformed: Column,
        sums: list[Column],
    ) -> None:
        """T = C^T G and M = T K; a diagonal factor scales the product of the other."""
        left, right = axes
        rows, columns = left.size, right.size
        if left.dense:
            row = Product(
                a=left.old,
                a_columns=rows,
                b=gradient,
                b_columns=columns,
                output=left_product if right.dense else transformed,
                m=rows,
                n=columns,
                k=rows,
                row_scales=0,
                column_scales=0 if right.dense else right.scale,
                row_sums=0,
                column_sums=0 if right.dense else sums[1],
            )
            self.job("left", rows, grid, row)
        if right.dense or not left.dense:
            depth = columns if right.dense else 0
            row = Product(
                a=left_product if left.dense else gradient,
                a_columns=columns,
                b=right.old if right.dense else 0,
                b_columns=columns,
                output=transformed,
                m=rows,
                n=columns,
                k=depth,
                row_scales=left.scale,
                column_scales=right.scale,
                row_sums=sums[0],
                column_sums=sums[1],
            )
            self.job("right", depth, grid, row)

    def add_momentum(
        self, axis: _Axis, other: _Axis, transformed: Column, columns: int, side: int
    ) -> None:
        d, block = axis.size, self.block
        row = Momenta(
            factor=axis.old,
            transformed=transformed,
            size=d,
            others=other.size,
            columns=columns,
            side=side,
            momentum=axis.momentum,
            copy=axis.momentum_operand if axis.copied else 0,
            trace=other.squares if other.dense else other.factor,
            trace_count=other.squares_count if other.dense else other.size,
            trace_squares=int(not other.dense),
            norms=axis.norms,
            spill=axis.spill,
            nonzeros=axis.nonzeros,
            nonzeros_count=axis.nonzeros_count,
        )
        grid = triangle_of(d, block) if axis.dense else grid_of(d, 1, block, block)
        self.job("momenta", d + other.size if axis.dense else 0, grid, row)

    def add_factor(self, n: int, axis: _Axis) -> None:
        d, block = axis.size, self.block
        row = Factors(
            old=axis.old,
            operand=axis.momentum_operand,
            size=d,
            factor=axis.factor,
            residual=axis.residual,
            copy=axis.new if axis.copied else 0,
            norms=axis.norms,
            norms_count=axis.norms_count,
            structure=axis.structure,
            spill=axis.spill,
            nonzeros=axis.nonzeros,
            nonzeros_count=axis.nonzeros_count,
        )
        operands: Operands = ()
        if self.stacked:
            operands = (self.stack(axis.old, d, d), False), (self.state("momenta", n, axis), True)
        grid = grid_of(d, d if axis.dense else 1, block, block)
        self.job("factors", d if axis.dense else 0, grid, row, operands=operands)

    def add_products(self, n: int, axis: _Axis) -> None:
        if not axis.dense:
            return
        row = Square(
            factor=axis.new,
            product=axis.product,
            size=axis.size,
            copy=axis.product_operand if axis.copied else 0,
            spill=axis.spill,
            state=0,
        )
        operands = ((self.state("factors", n, axis), False),) if self.stacked else ()
        self.job("products", axis.size, triangle_of(axis.size, self.block), row, operands=operands)

    def add_step(
        self, bucket: MatrixBucket, axes: list[_Axis], gradient: Tensor, left_product: Tensor
    ) -> None:
        """V = (C C^T) G, P = V (K K^T) and the descent."""
        left, right = axes
        rows, columns = bucket.sizes
        grid = grid_of(rows, columns, self.block, self.block)
        if self.stacked:
            g, v = (self.stack(s, rows, columns) for s in (gradient, left_product))
            self.vendor("precondition", self.state("products", 0, left), g, v)
        elif left.dense and right.dense:
            row = Product(
                a=left.product_operand,
                a_columns=rows,
                b=gradient,
                b_columns=columns,
                output=left_product,
                m=rows,
                n=columns,
                k=rows,
                row_scales=0,
                column_scales=0,
                row_sums=0,
                column_sums=0,
            )
            self.job("precondition", rows, grid, row)
        if right.dense:
            a, depth, b = left_product, columns, right.product_operand
        elif left.dense:
            a, depth, b = left.product_operand, rows, gradient
        else:
            a, depth, b = gradient, 0, gradient
        spill: Column = 0
        if depth == 0:
            spill = gradient
        elif columns % LAYOUT.row_multiple:
            spill = self.scratch(len(gradient), rows * padded(columns), 4)
        row = Params(
            a=a,
            a_columns=depth or columns,
            b=b,
            b_columns=columns,
            member=torch.tensor(bucket.indices, device="cpu"),
            m=rows,
            n=columns,
            k=depth,
            row_scales=left.scale,
            column_scales=right.scale,
            spill=spill,
        )
        for dtype in dict.fromkeys(bucket.param_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.param_dtypes], device="cpu")
            part = row._make([c[chosen] if isinstance(c, Tensor) else c for c in row])
            self.job("params", depth, grid, part, dtype=dtype)
