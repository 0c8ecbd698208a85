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

from .matrix_axes import Panel, moved
from .matrix_gathers import GATHER_COLUMNS, GATHER_ROWS, Axis, GatherDraft
from .matrix_plan import MatrixBucket, MatrixPlan, Operands, Tiling, grid_of, triangle_of
from .slots import (
    GATHERED,
    LAYOUT,
    SIDE,
    Column,
    Factors,
    Gather,
    Momenta,
    Params,
    Product,
    Square,
    padded,
)


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


class _Builder(GatherDraft):
    def add(self, bucket: MatrixBucket, number: int, stacked: bool) -> None:
        self.number, self.stacked = number, stacked
        left, right = axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        count, neither = len(bucket.indices), not any(bucket.dense)
        itemsize = self.dtype.itemsize
        elements = left.extent * padded(right.extent)
        gradient = self.scratch(count, elements, 4 if neither else itemsize)
        nonzeros, nonzeros_count = torch.zeros(count, device="cpu", dtype=torch.int64), 0
        if self.update:
            nonzeros_count = len(grid_of(left.extent, right.extent, GATHER_ROWS, GATHER_COLUMNS))
            nonzeros = self.scratch(count, nonzeros_count, 4)
        for axis in axes:
            axis.nonzeros, axis.nonzeros_count = nonzeros, nonzeros_count
        for dtype in dict.fromkeys(bucket.grad_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.grad_dtypes], device="cpu")
            indices = torch.tensor(bucket.indices, device="cpu")[chosen]
            row = Gather(
                source=indices,
                target=gradient[chosen],
                rows=left.size,
                columns=right.size,
                target_rows=left.extent,
                target_columns=right.extent,
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

    def add_update(self, axes: list[Axis], gradient: Tensor, left_product: Tensor) -> None:
        left, right = axes
        count, itemsize = len(gradient), self.dtype.itemsize
        # A diagonal factor's sums of squares of M: along rows from each tile column, or the other.
        sums = [
            0 if axis.dense else self.scratch(count, other.tiles(self.block) * axis.size, 4)
            for axis, other in ((left, right), (right, left))
        ]
        transformed = 0
        if left.dense or right.dense:
            transformed = self.scratch(count, left.extent * padded(right.extent), itemsize)
        if self.stacked:
            shape = left.size, right.size
            g, t, m = (self.stack(s, *shape) for s in (gradient, left_product, transformed))
            self.vendor("left", self.state("factors", 0, left), g, t, transposed=True)
            self.vendor("right", t, self.state("factors", 1, right), m)
        else:
            self.add_transformed(axes, gradient, left_product, transformed, sums)
        for n, (axis, other) in enumerate(zip(axes, reversed(axes), strict=True)):
            seen = transformed if axis.dense else sums[n]
            for panel in axis.panels:
                self.add_momentum(n, axis, other, panel, seen, right.extent)
                self.add_factor(n, axis, panel)

    def add_transformed(
        self,
        axes: list[Axis],
        gradient: Column,
        left_product: Column,
        transformed: Column,
        sums: list[Column],
    ) -> None:
        """T = C^T G and M = T K; a diagonal factor scales the product of the other."""
        left, right = axes
        if left.dense:
            output = left_product if right.dense else transformed
            for panel in left.panels:
                tiles = panel.index * -(-left.block // self.block)
                scales = {} if right.dense else {
                    "column_scales": right.scale,
                    "column_sums": moved(sums[1], 4 * tiles * right.size),
                }  # fmt: skip
                self.add_left("left", axes, panel, left.old, gradient, output, **scales)
        if right.dense or not left.dense:
            for panel in right.panels:
                tiles = panel.index * -(-right.block // self.block)
                first = panel.first * self.dtype.itemsize
                row = Product(
                    a=moved(left_product if left.dense else gradient, first),
                    a_columns=right.extent,
                    b=right.square(right.old, panel, self.dtype.itemsize) if right.dense else 0,
                    b_columns=right.block,
                    output=moved(transformed, first),
                    output_columns=right.extent,
                    m=left.extent,
                    n=right.block,
                    k=right.block if right.dense else 0,
                    row_scales=left.scale,
                    column_scales=right.scale,
                    row_sums=moved(sums[0], 4 * tiles * left.size),
                    column_sums=sums[1],
                )
                grid = grid_of(left.extent, right.block, self.block, self.block)
                self.job("right", row.k, grid, row)

    def add_left(
        self,
        name: str,
        axes: list[Axis],
        panel: Panel,
        factor: Column,
        gradient: Column,
        output: Column,
        column_scales: Column = 0,
        column_sums: Column = 0,
    ) -> None:
        """A product of a block with the rows of G that are its own."""
        left, right = axes
        itemsize = self.dtype.itemsize
        first = panel.first * padded(right.extent) * itemsize
        row = Product(
            a=left.square(factor, panel, itemsize),
            a_columns=left.block,
            b=moved(gradient, first),
            b_columns=right.extent,
            output=moved(output, first),
            output_columns=right.extent,
            m=left.block,
            n=right.extent,
            k=left.block,
            row_scales=0,
            column_scales=column_scales,
            row_sums=0,
            column_sums=column_sums,
        )
        grid = grid_of(left.block, right.extent, self.block, self.block)
        self.job(name, left.block, grid, row)

    def add_momentum(
        self, n: int, axis: Axis, other: Axis, panel: Panel, seen: Column, columns: int
    ) -> None:
        """m of a block, from the rows or columns of M that are its own, or of a diagonal factor."""
        d, itemsize = axis.block, self.dtype.itemsize
        first = panel.first * (1 if n else padded(columns)) * itemsize
        grid = self.factor_grid(axis)
        row = Momenta(
            factor=axis.square(axis.old, panel, itemsize),
            transformed=moved(seen, first),
            size=d,
            lives=panel.live,
            others=other.size,
            columns=columns if axis.dense else other.tiles(self.block),
            side=(SIDE.rows, SIDE.columns)[n] if axis.dense else SIDE.diagonal,
            momentum=axis.square(axis.momentum, panel, itemsize),
            copy=axis.square(axis.momentum_operand, panel, itemsize) if axis.copied else 0,
            trace=other.squares if other.dense else other.factor,
            trace_count=other.squares_count if other.dense else other.size,
            trace_squares=int(not other.dense),
            norms=moved(axis.norms, 4 * len(grid) * panel.index),
            spill=axis.square(axis.spill, panel, 4),
            nonzeros=axis.nonzeros,
            nonzeros_count=axis.nonzeros_count,
        )
        self.job("momenta", d + other.size if axis.dense else 0, grid, row)

    def add_factor(self, n: int, axis: Axis, panel: Panel) -> None:
        d, block, itemsize = axis.block, self.block, self.dtype.itemsize
        norms_index = 0 if axis.norms_count > len(self.factor_grid(axis)) else panel.index
        row = Factors(
            old=axis.square(axis.old, panel, itemsize),
            operand=axis.square(axis.momentum_operand, panel, itemsize),
            size=d,
            factor=axis.square(axis.factor, panel, itemsize),
            residual=axis.square(axis.residual, panel, 2),
            copy=axis.square(axis.new, panel, itemsize) if axis.copied else 0,
            norms=moved(axis.norms, 4 * axis.norms_count * norms_index),
            norms_count=axis.norms_count,
            structure=axis.structure,
            spill=axis.square(axis.spill, panel, 4),
            nonzeros=axis.nonzeros,
            nonzeros_count=axis.nonzeros_count,
        )
        operands: Operands = ()
        if self.stacked:
            operands = (self.stack(axis.old, d, d), False), (self.state("momenta", n, axis), True)
        grid = grid_of(d, d if axis.dense else 1, block, block)
        self.job("factors", d if axis.dense else 0, grid, row, operands=operands)

    def add_products(self, n: int, axis: Axis) -> None:
        d, itemsize = axis.block, self.dtype.itemsize
        operands = ((self.state("factors", n, axis), False),) if self.stacked else ()
        for panel in axis.panels if axis.dense else ():
            row = Square(
                factor=axis.square(axis.new, panel, itemsize),
                product=axis.square(axis.product, panel, itemsize),
                size=d,
                copy=axis.square(axis.product_operand, panel, itemsize) if axis.copied else 0,
                spill=axis.square(axis.spill, panel, 4),
                state=0,
            )
            self.job("products", d, triangle_of(d, self.block), row, operands=operands)

    def add_step(
        self, bucket: MatrixBucket, axes: list[Axis], gradient: Tensor, left_product: Tensor
    ) -> None:
        """V = (C C^T) G, P = V (K K^T) and the descent."""
        left, right = axes
        both = left.dense and right.dense
        if self.stacked:
            g, v = (self.stack(s, left.size, right.size) for s in (gradient, left_product))
            self.vendor("precondition", self.state("products", 0, left), g, v)
        for panel in left.panels if both and not self.stacked else ():
            operand = left.product_operand
            self.add_left("precondition", axes, panel, operand, gradient, left_product)
        if left.dense and not right.dense:
            for panel in left.panels:
                self.add_rows_of_params(bucket, axes, panel, gradient)
            return
        for panel in right.panels:
            self.add_columns_of_params(
                bucket, axes, panel, left_product if left.dense else gradient, gradient
            )

    def add_rows_of_params(
        self, bucket: MatrixBucket, axes: list[Axis], panel: Panel, gradient: Tensor
    ) -> None:
        """P = (C C^T) G times a diagonal factor, of the rows of a block of C."""
        left, right = axes
        itemsize = self.dtype.itemsize
        row = Params(
            a=left.square(left.product_operand, panel, itemsize),
            a_columns=left.block,
            b=moved(gradient, panel.first * padded(right.size) * itemsize),
            b_columns=right.size,
            member=torch.tensor(bucket.indices, device="cpu"),
            first=panel.first * right.size,
            columns=right.size,
            m=panel.live,
            n=right.size,
            k=left.block,
            row_scales=left.scale,
            column_scales=right.scale,
            spill=self.params_spill(len(gradient), panel.live, right.size, right.size),
        )
        self.add_params(bucket, row)

    def add_columns_of_params(
        self, bucket: MatrixBucket, axes: list[Axis], panel: Panel, a: Tensor, gradient: Tensor
    ) -> None:
        """P = V (K K^T), of the columns of a block of K; or G times two diagonal factors."""
        left, right = axes
        itemsize = self.dtype.itemsize
        spill: Column = gradient  # which is float32 where no factor is dense
        if right.dense:
            spill = self.params_spill(len(gradient), left.size, panel.live, right.size)
        row = Params(
            a=moved(a, panel.first * itemsize),
            a_columns=right.extent,
            b=right.square(right.product_operand, panel, itemsize) if right.dense else gradient,
            b_columns=right.block,
            member=torch.tensor(bucket.indices, device="cpu"),
            first=panel.first,
            columns=right.size,
            m=left.size,
            n=panel.live,
            k=right.block if right.dense else 0,
            row_scales=left.scale,
            column_scales=right.scale,
            spill=spill,
        )
        self.add_params(bucket, row)

    def params_spill(self, count: int, rows: int, columns: int, row_length: int) -> Column:
        """Room for P of a job, where rows of parameters are not aligned."""
        if row_length % LAYOUT.row_multiple == 0:
            return 0
        return self.scratch(count, rows * padded(columns), 4)

    def add_params(self, bucket: MatrixBucket, row: Params) -> None:
        grid = grid_of(row.m, row.n, self.block, self.block)
        for dtype in dict.fromkeys(bucket.param_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.param_dtypes], device="cpu")
            part = row._make([c[chosen] if isinstance(c, Tensor) else c for c in row])
            self.job("params", row.k, grid, part, dtype=dtype)
