"""Which matrices each launch of root-free Shampoo computes, and where their operands are.

As kernels/matrix_jobs.py for IF-Shampoo: a plan depends on where S, K, their residuals and products
lie, on shapes and on dtypes; what lives for one step alone has its bytes in one scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .matrix_axes import Panel, moved
from .matrix_gathers import GATHER_COLUMNS, GATHER_ROWS
from .matrix_plan import MatrixPlan, Operands, Tiling, addresses_of, grid_of, starts_aligned
from .rootfree_shampoo_buckets import Axis, ShampooBucket, names_of
from .rootfree_shampoo_slots import Descent, Direction, Momentum, Rows, Scale, Transform
from .rootfree_shampoo_updates import UpdateDraft
from .slots import LAYOUT, SIDE, Column, padded

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


class _Builder(UpdateDraft):
    def __init__(
        self, dtype: torch.dtype, block: int, update: bool, refresh: bool, balanced: bool
    ) -> None:
        super().__init__(dtype, block, update)
        self.refresh, self.balanced = refresh, balanced

    def add(self, bucket: ShampooBucket, number: int, stacked: bool) -> None:
        self.begin(bucket, number, stacked)
        axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        common = self.add_scale(bucket, axes)
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
                nonzero = moved(largest, 4 * tiles)  # after the numbers of the tiles
                self.add_update(n, axis, other, axes[1].extent, nonzero)
            if axis.dense and (self.update or self.makes_product(axis)):
                self.add_inverse(n, axis)
        self.add_direction(bucket, axes, ahead, largest, tiles)

    def makes_product(self, axis: Axis) -> bool:
        return self.update or self.refresh or not axis.kept

    def axis(self, bucket: ShampooBucket, n: int) -> Axis:
        """The operands of an axis, and the copies that they need."""
        stacks = bucket.grams[n], bucket.factors[n], bucket.residuals[n], bucket.products[n]
        aligned = bucket.blocks[n] % LAYOUT.row_multiple == 0 and all(map(starts_aligned, stacks))
        state = [addresses_of(stack, self.count) for stack in stacks]
        axis = Axis(bucket.sizes[n], bucket.factors[n], aligned, state)
        if not axis.dense:
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
        d = axis.block
        for panel in axis.panels:
            row = Scale(
                source=axis.square(source, panel, self.itemsize),
                target=axis.square(target, panel, self.itemsize),
                rows=d,
                columns=d,
                stats=0,
                stats_count=0,
                dtype=0,
            )
            self.job("scale", 0, grid_of(d, d, GATHER_ROWS, GATHER_COLUMNS), row)

    def add_scale(self, bucket: ShampooBucket, axes: list[Axis]) -> dict[str, Any]:
        """Returns what every job on the gradients has."""
        rows, columns = bucket.sizes
        grid = self.gradient_grid(axes)
        stats = self.scratch(self.count, 2 * len(grid), 4)
        dtype = names_of(bucket.grad_dtypes)
        common = {"stats": stats, "stats_count": len(grid), "dtype": dtype}
        row = Scale(source=self.member, target=0, rows=rows, columns=columns, **common)
        self.job("scale", 0, grid, row)
        targets = {"target_rows": axes[0].extent, "target_columns": axes[1].extent}
        return {**common, **targets, "member": self.member, "m": rows, "n": columns}

    def gradient_grid(self, axes: list[Axis]) -> Tensor:
        """The tiles of launches on gradients, over all padding of blocks too."""
        return grid_of(axes[0].extent, axes[1].extent, GATHER_ROWS, GATHER_COLUMNS)

    def momentum(self, columns: dict[str, Column], axes: list[Axis]) -> None:
        row = Momentum(**{name: columns.get(name, 0) for name in Momentum._fields})
        self.job("momentum", 0, self.gradient_grid(axes), row)

    def add_transformed(
        self, axes: list[Axis], common: dict[str, Column], gradient: Column
    ) -> None:
        """Y = G K_B, of which S_A is made, and Z = K_A^T G, of which S_B is."""
        left, right = axes
        for n, (axis, other, scales, sums) in enumerate(
            (
                (left, right, "column_scales", "row_sums"),
                (right, left, "row_scales", "column_sums"),
            )
        ):
            columns: dict[str, Column] = {}
            if axis.dense:
                axis.seen = self.matrix()
            else:
                tile = self.block if other.dense else (GATHER_COLUMNS, GATHER_ROWS)[n]
                axis.sums_count = other.tiles(tile)
                axis.seen = columns[sums] = self.scratch(self.count, axis.sums_count * axis.size, 4)
            if not other.dense:
                columns |= {"ahead": axis.seen if axis.dense else 0, scales: other.factor}
                self.momentum({**common, **columns}, axes)
            elif self.stacked:
                self.add_transformed_stack(n, axes, gradient)
            else:
                for panel in other.panels:
                    self.add_transform(n, axes, panel, gradient)

    def add_transform(self, n: int, axes: list[Axis], panel: Panel, gradient: Column) -> None:
        """The columns of Y, or the rows of Z, of a block of the other axis' K."""
        left, right = axes
        axis, other = axes[n], axes[1 - n]
        first = panel.first * (padded(right.extent) if n else 1) * self.itemsize
        tiles = panel.index * -(-other.block // self.block)
        sums = 0 if axis.dense else moved(axis.seen, 4 * tiles * axis.size)
        row = Transform(
            gradient=moved(gradient, first),
            factor=other.square(other.old, panel, self.itemsize),
            output=moved(axis.seen, first) if axis.dense else 0,
            columns=right.extent,
            m=left.block if n else left.extent,
            n=right.extent if n else right.block,
            side=SIDE.rows if n else SIDE.columns,
            row_sums=0 if n else sums,
            column_sums=sums if n else 0,
        )
        self.job("transform", other.block, self.tiles_of(row), row)

    def tiles_of(self, row: Any) -> Tensor:
        """The tiles of a product of m rows and n columns."""
        return grid_of(row.m, row.n, self.block, self.block)

    def add_transformed_stack(self, n: int, axes: list[Axis], gradient: Column) -> None:
        shape = axes[0].size, axes[1].size
        g, out = self.stack(gradient, *shape), self.stack(axes[n].seen, *shape)
        k = self.state("factors", 1 - n, axes[1 - n])
        if n == 0:
            self.vendor("transform", g, k, out)
        else:
            self.vendor("transform", k, g, out, transposed=True)

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
        # Y and Z have been read by then.
        rooms = [axis.seen for axis in axes if axis.dense] if self.update else []
        x_n = ahead
        operands: Operands = ()
        if left.dense and right.dense:
            x_n = rooms.pop() if rooms else self.matrix()
            if self.stacked:
                n, v = self.stack(ahead, rows, columns), self.stack(x_n, rows, columns)
                self.vendor("left", self.state("products", 0, left), n, v)
                operands = (v, False), (self.state("products", 1, right), True)
            else:
                for panel in left.panels:
                    row = self.rows_of_direction(axes, panel, ahead, x_n)
                    self.job("left", left.block, self.tiles_of(row), row)
        direction = ahead
        if left.dense or right.dense:
            direction = rooms.pop() if rooms else self.matrix()
        by_rows = left.dense and not right.dense
        panels = left.panels if by_rows else right.panels
        across = sum(-(-panel.live // self.block) for panel in right.panels)
        most = left.tiles(self.block) * right.tiles(self.block)
        tile_sums = self.scratch(self.count, most, 4)
        row_sums = self.scratch(self.count, across * rows, 4) if self.balanced else 0
        tiles = 0
        for panel in panels:
            if by_rows:
                row = self.rows_of_direction(axes, panel, ahead, direction)._replace(m=panel.live)
                sums = panel.first
            else:
                row = self.columns_of_direction(axes, panel, x_n, direction)
                sums = panel.index * -(-right.block // self.block) * rows
            grid = self.tiles_of(row)
            row = row._replace(
                row_scales=left.scale,
                column_scales=right.scale,
                row_sums=moved(row_sums, 4 * sums),
                tile_sums=moved(tile_sums, 4 * tiles),
                largest=largest,
                largest_count=largest_count,
            )
            tiles += len(grid)
            self.job("directions", row.k, grid, row, operands=operands)
        self.add_descent(bucket, direction, tile_sums, tiles, row_sums, across)

    def rows_of_direction(
        self, axes: list[Axis], panel: Panel, n: Column, out: Column
    ) -> Direction:
        """X_A N, of the rows of a block of X_A."""
        left, right = axes
        first = panel.first * padded(right.extent) * self.itemsize
        row = {
            "a": left.square(left.product_operand, panel, self.itemsize),
            "a_columns": left.block, "b": moved(n, first), "b_columns": right.extent,
            "output": moved(out, first), "output_columns": right.extent,
            "m": left.block, "n": right.extent, "k": left.block, "sums_rows": left.size,
        }  # fmt: skip
        return Direction(**{field: row.get(field, 0) for field in Direction._fields})

    def columns_of_direction(
        self, axes: list[Axis], panel: Panel, a: Column, out: Column
    ) -> Direction:
        """P from X_A N or N, of the columns of a block of X_B; of two diagonal axes all of it."""
        left, right = axes
        first = panel.first * self.itemsize
        row = {
            "a": moved(a, first), "a_columns": right.extent,
            "b": right.square(right.product_operand, panel, self.itemsize),
            "b_columns": right.block,
            "output": moved(out, first), "output_columns": right.extent,
            "m": left.size, "n": panel.live, "k": right.block if right.dense else 0,
            "sums_rows": left.size,
        }  # fmt: skip
        return Direction(**{field: row.get(field, 0) for field in Direction._fields})

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
            columns=self.row_length,
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
