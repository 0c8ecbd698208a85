"""Which matrices each launch of root-free Shampoo computes, and where their operands are.

As kernels/matrix_jobs.py for IF-Shampoo: a plan depends on where S, K, their residuals and products
lie, on shapes and on dtypes; what lives for one step alone has its bytes in one scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .matrix_jobs import GATHER_COLUMNS, GATHER_ROWS
from .matrix_plan import (
    MatrixPlan,
    Operands,
    Tiling,
    addresses_of,
    grid_of,
    starts_aligned,
    triangle_of,
)
from .rootfree_shampoo_buckets import Axis, BucketDraft, ShampooBucket, names_of
from .rootfree_shampoo_slots import (
    DAMPING,
    Damped,
    Descent,
    Direction,
    Gram,
    Momentum,
    Root,
    Rows,
    Scale,
    Symmetric,
    Transform,
)
from .slots import LAYOUT, SIDE, Column, Square

ROWS = 256  # of a program of the rows' launch


def build_plan(
    buckets: Sequence[ShampooBucket],
    stacked: Sequence[bool],
    dtype: torch.dtype,
    tiling: Tiling,
    device: torch.device,
    *,
    update: bool,
    refresh: bool,
    balanced: bool,
) -> MatrixPlan:
    """The launches of one step: with new factors (update), new products alone (refresh), or none.

    stacked: of each bucket, whether its products are of whole stacks: the stacked kernel's, or the
    vendor's where there is no epilogue; all of its state must be aligned, and dense. balanced:
    whether rows are.
    """
    builder = _Builder(dtype, tiling.block, update, refresh, balanced)
    for number, (bucket, is_stacked) in enumerate(zip(buckets, stacked, strict=True)):
        builder.add(bucket, number, is_stacked)
    return builder.finish(device)


class _Builder(BucketDraft):
    def __init__(
        self, dtype: torch.dtype, block: int, update: bool, refresh: bool, balanced: bool
    ) -> None:
        super().__init__(dtype)
        self.block = block
        self.update, self.refresh, self.balanced = update, refresh, balanced

    def add(self, bucket: ShampooBucket, number: int, stacked: bool) -> None:
        self.begin(bucket, number, stacked)
        columns = bucket.sizes[1]
        axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        common = self.add_scale(bucket)
        tiles = common["stats_count"]
        ahead, largest = self.matrix(), self.scratch(self.count, tiles + 1, 4)
        gradient: Column = 0
        if self.update and not self.wide:
            gradient = self.matrix()
        momentum = {"gradient": gradient, "wide" if self.wide else "ahead": ahead}
        self.momentum({**common, **momentum, "largest": largest}, axes)
        if self.update:
            self.add_transformed(axes, common, gradient)
        for n, (axis, other) in enumerate(zip(axes, axes[::-1], strict=True)):
            if self.update:
                # After the numbers of the tiles: addresses in the scratch are negative.
                self.add_update(n, axis, other, columns, nonzero=largest - 4 * tiles)
            if axis.dense and (self.update or self.makes_product(axis)):
                self.add_inverse(n, axis)
        self.add_direction(bucket, axes, ahead, largest, tiles)

    def makes_product(self, axis: Axis) -> bool:
        return self.update or self.refresh or not axis.kept

    def axis(self, bucket: ShampooBucket, n: int) -> Axis:
        """The operands of an axis, and the copies that they need."""
        size, dense = bucket.sizes[n], bucket.dense[n]
        stacks = bucket.grams[n], bucket.factors[n], bucket.residuals[n], bucket.products[n]
        aligned = size % LAYOUT.row_multiple == 0 and all(map(starts_aligned, stacks))
        axis = Axis(size, dense, aligned, [addresses_of(stack, self.count) for stack in stacks])
        if not dense:
            return axis
        makes_product = self.makes_product(axis)
        if not aligned:
            if makes_product:
                axis.spill = self.square(axis, 4)
                axis.old = axis.new = self.square(axis)
                self.gather_state(axis.factor, axis.old, axis)
            if axis.kept:
                axis.product_operand = self.square(axis)
            if not makes_product:
                self.gather_state(axis.product, axis.product_operand, axis)
        if not axis.kept:
            axis.product_operand = self.square(axis)
        if self.update:
            axis.new = self.square(axis)
        return axis

    def gather_state(self, source: Tensor, target: Tensor, axis: Axis) -> None:
        d = axis.size
        row = Scale(
            source=source, target=target, rows=d, columns=d, stats=0, stats_count=0, dtype=0
        )
        self.job("scale", 0, grid_of(d, d, GATHER_ROWS, GATHER_COLUMNS), row)

    def add_scale(self, bucket: ShampooBucket) -> dict[str, Any]:
        """Returns what every job on the gradients has."""
        rows, columns = bucket.sizes
        grid = grid_of(rows, columns, GATHER_ROWS, GATHER_COLUMNS)
        stats = self.scratch(self.count, 2 * len(grid), 4)
        dtype = names_of(bucket.grad_dtypes)
        common = {"stats": stats, "stats_count": len(grid), "dtype": dtype}
        row = Scale(source=self.member, target=0, rows=rows, columns=columns, **common)
        self.job("scale", 0, grid, row)
        return {**common, "member": self.member, "m": rows, "n": columns}

    def momentum(self, columns: dict[str, Column], axes: list[Axis]) -> None:
        row = Momentum(**{name: columns.get(name, 0) for name in Momentum._fields})
        grid = grid_of(axes[0].size, axes[1].size, GATHER_ROWS, GATHER_COLUMNS)
        self.job("momentum", 0, grid, row)

    def add_transformed(
        self, axes: list[Axis], common: dict[str, Column], gradient: Column
    ) -> None:
        """Y = G K_B, of which S_A is made, and Z = K_A^T G, of which S_B is."""
        left, right = axes
        for n, (axis, other, side, scales, sums) in enumerate(
            (
                (left, right, SIDE.columns, "column_scales", "row_sums"),
                (right, left, SIDE.rows, "row_scales", "column_sums"),
            )
        ):
            block = self.block if other.dense else (GATHER_COLUMNS, GATHER_ROWS)[n]
            columns: dict[str, Column] = {}
            if axis.dense:
                axis.seen = self.matrix()
            else:
                axis.sums_count = -(-other.size // block)
                axis.seen = columns[sums] = self.scratch(self.count, axis.sums_count * axis.size, 4)
            if not other.dense:
                columns |= {"ahead": axis.seen if axis.dense else 0, scales: other.factor}
                self.momentum({**common, **columns}, axes)
            elif self.stacked:
                self.add_transformed_stack(n, axes, gradient)
            else:
                row = Transform(
                    gradient=gradient,
                    factor=other.old,
                    output=axis.seen if axis.dense else 0,
                    m=left.size,
                    n=right.size,
                    side=side,
                    row_sums=columns.get("row_sums", 0),
                    column_sums=columns.get("column_sums", 0),
                )
                grid = grid_of(left.size, right.size, self.block, self.block)
                self.job("transform", other.size, grid, row)

    def add_transformed_stack(self, n: int, axes: list[Axis], gradient: Column) -> None:
        shape = axes[0].size, axes[1].size
        g, out = self.stack(gradient, *shape), self.stack(axes[n].seen, *shape)
        k = self.state("factors", 1 - n, axes[1 - n])
        if n == 0:
            self.vendor("transform", g, k, out)
        else:
            self.vendor("transform", k, g, out, transposed=True)

    def add_update(self, n: int, axis: Axis, other: Axis, columns: int, nonzero: Tensor) -> None:
        """S, then K, of axis n."""
        d, block = axis.size, self.block
        across = -(-d // block)
        trace = self.scratch(self.count, across, 4)
        copy: Column = self.square(axis) if axis.dense else 0
        row = Gram(
            seen=axis.seen,
            size=d,
            others=other.size,
            columns=columns if axis.dense else axis.sums_count,
            side=(SIDE.rows, SIDE.columns)[n] if axis.dense else SIDE.diagonal,
            gram=axis.gram,
            copy=copy,
            trace=trace,
            spill=axis.spill,
            nonzero=nonzero,
        )
        grid = triangle_of(d, block) if axis.dense else grid_of(d, 1, block, block)
        self.job("grams", other.size if axis.dense else 0, grid, row)
        damped: Column = self.square(axis) if axis.dense else 0
        is_product = axis.dense and not self.stacked
        kinds = DAMPING.product if is_product else DAMPING.sum if axis.dense else DAMPING.root
        row_of_damped = Damped(
            damping=kinds,
            gram=copy if is_product else axis.gram,
            factor=axis.old,
            output=copy if self.stacked else damped,
            size=d,
            trace=trace,
            trace_count=across,
            nonzero=nonzero,
        )
        grid = grid_of(d, d if is_product else 1, block, block)
        self.job("damped", d if is_product else 0, grid, row_of_damped)
        if self.stacked:
            s, t = self.stack(copy, d, d), self.stack(damped, d, d)
            self.vendor("damped", s, self.state("factors", n, axis), t)
        if axis.dense:
            self.add_root(n, axis, copy, damped, nonzero)

    def add_root(
        self, n: int, axis: Axis, residual: Column, damped: Column, nonzero: Tensor
    ) -> None:
        """E takes the place of the copy of S."""
        d = axis.size
        of_square: Operands = ()
        of_root: Operands = ()
        if self.stacked:
            k, e = self.state("factors", n, axis), self.stack(residual, d, d)
            of_square, of_root = ((e, False), (e, True)), ((k, False), (e, True))
        triangle = triangle_of(d, self.block)
        norms, squares = (self.scratch(self.count, len(triangle), 4) for _ in range(2))
        of_e = Symmetric(
            a=axis.old, b=damped, output=residual, size=d, norms=norms, nonzero=nonzero
        )
        self.job("residuals", d, triangle, of_e)
        of_squares = Symmetric(
            a=residual, b=residual, output=0, size=d, norms=squares, nonzero=nonzero
        )
        self.job("squares", d, triangle, of_squares, operands=of_square)
        row = Root(
            operand=axis.old,
            residual=residual,
            size=d,
            factor=axis.factor,
            target=axis.new if axis.aligned else axis.factor,
            low=axis.residual,
            copy=0 if axis.aligned else axis.new,
            norms=norms,
            squares=squares,
            norms_count=len(triangle),
            spill=axis.spill,
            nonzero=nonzero,
        )
        grid = grid_of(d, d, self.block, self.block)
        self.job("roots", d, grid, row, operands=of_root)

    def add_inverse(self, n: int, axis: Axis) -> None:
        ragged = axis.kept and not axis.aligned
        row = Square(
            factor=axis.new,
            product=axis.product if axis.kept else axis.product_operand,
            size=axis.size,
            copy=axis.product_operand if ragged else 0,
            spill=axis.spill if ragged else 0,
            state=axis.factor if self.update and axis.aligned else 0,
        )
        operands: Operands = ()
        if self.stacked:
            of_update = self.stack(axis.new, axis.size, axis.size) if self.update else None
            operands = ((of_update or self.state("factors", n, axis), False),)
        triangle = triangle_of(axis.size, self.block)
        self.job("inverses", axis.size, triangle, row, operands=operands)

    def add_direction(
        self,
        bucket: ShampooBucket,
        axes: list[Axis],
        ahead: Tensor,
        largest: Tensor,
        largest_count: int,
    ) -> None:
        left, right = axes
        rows, columns = bucket.sizes
        common: dict[str, Column] = {"m": rows, "n": columns}
        # Y and Z have been read by then.
        rooms = [axis.seen for axis in axes if axis.dense] if self.update else []
        a, b, depth, operands = ahead, ahead, 0, ()
        if left.dense and right.dense:
            a = rooms.pop() if rooms else self.matrix()
            if self.stacked:
                n, v = self.stack(ahead, rows, columns), self.stack(a, rows, columns)
                self.vendor("left", self.state("products", 0, left), n, v)
                operands = (v, False), (self.state("products", 1, right), True)
            else:
                first = {"a": left.product_operand, "b": ahead, "output": a, "k": rows}
                self.direction("left", rows, common | first, axes)
            b, depth = right.product_operand, columns
        elif left.dense:
            a, depth = left.product_operand, rows
        elif right.dense:
            b, depth = right.product_operand, columns
        direction = ahead
        if depth > 0:
            direction = rooms.pop() if rooms else self.matrix()
        tiles = len(grid_of(rows, columns, self.block, self.block))
        across = -(-columns // self.block)
        tile_sums = self.scratch(self.count, tiles, 4)
        row_sums = self.scratch(self.count, across * rows, 4) if self.balanced else 0
        last = {
            "a": a, "b": b, "output": direction, "k": depth,
            "row_scales": left.scale, "column_scales": right.scale,
            "row_sums": row_sums, "tile_sums": tile_sums,
            "largest": largest, "largest_count": largest_count,
        }  # fmt: skip
        self.direction("directions", depth, common | last, axes, operands)
        self.add_descent(bucket, direction, tile_sums, tiles, row_sums, across)

    def add_descent(
        self,
        bucket: ShampooBucket,
        direction: Tensor,
        tile_sums: Tensor,
        tiles: int,
        row_sums: Column,
        across: int,
    ) -> None:
        """From the direction and its sums of squares, by tile, and by row a tile column."""
        rows, columns = bucket.sizes
        totals, totals_count, factors = tile_sums, tiles, 0
        if self.balanced:
            totals_count = -(-rows // ROWS)
            totals = self.scratch(self.count, totals_count, 4)
            factors = self.scratch(self.count, rows, 4)
            of_rows = Rows(
                m=rows,
                n=columns,
                member=self.member,
                row_sums=row_sums,
                row_sums_count=across,
                tile_sums=tile_sums,
                tile_sums_count=tiles,
                factors=factors,
                totals=totals,
            )
            self.job("rows", 0, grid_of(rows, 1, ROWS, ROWS), of_rows)
        descent = Descent(
            direction=direction,
            m=rows,
            n=columns,
            wide=int(self.wide),
            dtype=names_of(bucket.param_dtypes),
            member=self.member,
            factors=factors,
            totals=totals,
            totals_count=totals_count,
        )
        self.job("descend", 0, grid_of(rows, columns, GATHER_ROWS, GATHER_COLUMNS), descent)

    def direction(
        self,
        name: str,
        cost: int,
        columns: dict[str, Column],
        axes: list[Axis],
        operands: Operands = (),
    ) -> None:
        row = Direction(**{field: columns.get(field, 0) for field in Direction._fields})
        grid = grid_of(axes[0].size, axes[1].size, self.block, self.block)
        self.job(name, cost, grid, row, operands=operands)
