"""Which matrices each launch of root-free Shampoo computes, and where their operands are.

As kernels/matrix_jobs.py for IF-Shampoo: a plan depends on where S, K, their residuals and products
lie, on shapes and on dtypes; what lives for one step alone has its bytes in one scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .matrix_jobs import GATHER_COLUMNS, GATHER_ROWS
from .matrix_plan import (
    MatrixPlan,
    PlanDraft,
    Tiling,
    addresses_of,
    grid_of,
    starts_aligned,
    triangle_of,
)
from .rootfree_shampoo_slots import (
    DTYPE,
    ROLE,
    Damped,
    Descent,
    Direction,
    Gram,
    Root,
    Scale,
    Symmetric,
    Transform,
)
from .slots import LAYOUT, SIDE, Column, Square, padded

# Rows of a program of the descent, and tiles of them of the gather's columns: fewer programs would
# each sum up the rows of their whole matrix less often, and with more rows the path of ragged rows
# would take more registers than leave room for a second program.
DESCENT_ROWS, DESCENT_TILES = 32, 8
_NAMES = {
    torch.float32: DTYPE.float32,
    torch.bfloat16: DTYPE.bfloat16,
    torch.float16: DTYPE.float16,
}


class ShampooBucket(NamedTuple):
    """Matrices of equal shapes, whose state is stacked; a list of it has a tensor an axis."""

    sizes: tuple[int, int]
    dense: tuple[bool, bool]
    indices: tuple[int, ...]  # in the caller's lists
    param_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    grams: Sequence[Tensor]
    factors: Sequence[Tensor]
    residuals: Sequence[Tensor]
    products: Sequence[Tensor]  # empty where K K^T is not kept

    @property
    def key(self) -> tuple[Any, ...]:
        """All that a plan for it depends on."""
        lists = self.grams, self.factors, self.residuals, self.products
        stacks = [tuple(map(Tensor.data_ptr, stacks)) for stacks in lists]
        return (*self[:5], *stacks)


def build_plan(
    buckets: Sequence[ShampooBucket],
    dtype: torch.dtype,
    tiling: Tiling,
    device: torch.device,
    *,
    update: bool,
    refresh: bool,
    balanced: bool,
) -> MatrixPlan:
    """The launches of one step: with new factors (update), new products alone (refresh), or none.

    balanced: whether rows are.
    """
    builder = _Builder(dtype, tiling.block, update, refresh, balanced)
    for bucket in buckets:
        builder.add(bucket)
    return builder.finish(device)


class _Axis:
    """An axis of a bucket; its operands are columns of addresses, zero where there is nothing."""

    seen: Column = 0  # Y or Z, or partial sums of squares of it
    spill: Column = 0  # room for the tiles of its launches, where rows are not aligned
    copy: Column = 0  # of K, for GEMMs to read where rows are not aligned

    def __init__(self, size: int, dense: bool, aligned: bool, state: Sequence[Tensor]) -> None:
        self.size, self.dense, self.aligned = size, dense, aligned
        self.gram, self.factor, self.residual, self.product = state
        self.old = self.new = self.factor  # for GEMMs to read, before and after the update
        self.kept = bool(self.product.any())
        self.product_operand = self.product

    @property
    def scale(self) -> Tensor:
        return torch.zeros_like(self.factor) if self.dense else self.factor


class _Builder(PlanDraft):
    def __init__(
        self, dtype: torch.dtype, block: int, update: bool, refresh: bool, balanced: bool
    ) -> None:
        super().__init__()
        self.dtype, self.block = dtype, block
        self.update, self.refresh, self.balanced = update, refresh, balanced

    def add(self, bucket: ShampooBucket) -> None:
        rows, columns = bucket.sizes
        self.count, self.wide = len(bucket.indices), not any(bucket.dense)
        self.member = torch.tensor(bucket.indices, device="cpu")
        self.elements, self.itemsize = rows * padded(columns), self.dtype.itemsize
        axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        gradient, stats, stats_count = self.add_scale(bucket)
        common = {
            "gradient": gradient, "m": rows, "n": columns, "wide": int(self.wide),
            "stats": stats, "stats_count": stats_count, "member": self.member,
        }  # fmt: skip
        if self.update:
            self.add_transformed(axes, common)
        tiles = len(grid_of(rows, columns, self.block, self.block))
        ahead, largest = self.matrix(), self.scratch(self.count, tiles + 1, 4)
        self.transform(
            0, {**common, "role": ROLE.momentum, "output": ahead, "largest": largest}, axes
        )
        for axis, other, side in zip(axes, axes[::-1], (SIDE.rows, SIDE.columns), strict=True):
            if self.update:
                self.add_update(axis, other, side, columns, largest + self.after(tiles))
            if axis.dense and (self.update or self.makes_product(axis)):
                self.add_inverse(axis)
        self.add_direction(bucket, axes, ahead, largest)

    @staticmethod
    def after(numbers: int) -> int:
        """What takes a column of addresses in the scratch past so many float32."""
        return -4 * numbers

    def makes_product(self, axis: _Axis) -> bool:
        return self.update or self.refresh or not axis.kept

    def square(self, axis: _Axis, itemsize: int | None = None) -> Tensor:
        """Room for a (d, d) matrix of padded rows."""
        return self.scratch(self.count, axis.size * padded(axis.size), itemsize or self.itemsize)

    def matrix(self) -> Tensor:
        """Room for an (m, n) matrix of padded rows."""
        return self.scratch(self.count, self.elements, 4 if self.wide else self.itemsize)

    def axis(self, bucket: ShampooBucket, n: int) -> _Axis:
        """The operands of an axis, and the copies that they need."""
        size, dense = bucket.sizes[n], bucket.dense[n]
        stacks = bucket.grams[n], bucket.factors[n], bucket.residuals[n], bucket.products[n]
        aligned = size % LAYOUT.row_multiple == 0 and all(map(starts_aligned, stacks))
        axis = _Axis(size, dense, aligned, [addresses_of(stack, self.count) for stack in stacks])
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

    def gather_state(self, source: Tensor, target: Tensor, axis: _Axis) -> None:
        row = Scale(
            source=source,
            target=target,
            rows=axis.size,
            columns=axis.size,
            stats=0,
            stats_count=0,
            dtype=0,
            wide=0,
        )
        self.job("scale", 0, grid_of(axis.size, axis.size, GATHER_ROWS, GATHER_COLUMNS), row)

    def add_scale(self, bucket: ShampooBucket) -> tuple[Tensor, Tensor, int]:
        """Returns where the gradient is, and its statistics."""
        rows, columns = bucket.sizes
        grid = grid_of(rows, columns, GATHER_ROWS, GATHER_COLUMNS)
        gradient, stats = self.matrix(), self.scratch(self.count, 2 * len(grid), 4)
        names = [_NAMES[dtype] for dtype in bucket.grad_dtypes]
        row = Scale(
            source=self.member,
            target=gradient,
            rows=rows,
            columns=columns,
            stats=stats,
            stats_count=len(grid),
            dtype=torch.tensor(names, device="cpu"),
            wide=int(self.wide),
        )
        self.job("scale", 0, grid, row)
        return gradient, stats, len(grid)

    def transform(self, cost: int, columns: dict[str, Column], axes: list[_Axis]) -> None:
        row = Transform(**{name: columns.get(name, 0) for name in Transform._fields})
        grid = grid_of(axes[0].size, axes[1].size, self.block, self.block)
        self.job("transform", cost, grid, row)

    def add_transformed(self, axes: list[_Axis], common: dict[str, Column]) -> None:
        """Y = G K_B, of which S_A is made, and Z = K_A^T G, of which S_B is."""
        left, right = axes
        across = [-(-axis.size // self.block) for axis in axes]
        for axis, other, role, scales, sums, count in (
            (left, right, ROLE.right, "column_scales", "row_sums", across[1]),
            (right, left, ROLE.left, "row_scales", "column_sums", across[0]),
        ):
            columns: dict[str, Column] = dict(common)
            if axis.dense:
                axis.seen = columns["output"] = self.matrix()
            else:
                axis.seen = columns[sums] = self.scratch(self.count, count * axis.size, 4)
            if other.dense:
                columns |= {"role": role, "factor": other.old}
            else:
                columns |= {"role": ROLE.scaled, scales: other.factor}
            self.transform(other.size if other.dense else 0, columns, axes)

    def add_update(
        self, axis: _Axis, other: _Axis, side: int, columns: int, nonzero: Tensor
    ) -> None:
        """S, then K."""
        d, block = axis.size, self.block
        across = -(-d // block)
        trace = self.scratch(self.count, across, 4)
        copy: Column = self.square(axis) if axis.dense else 0
        row = Gram(
            seen=axis.seen,
            size=d,
            others=other.size,
            columns=columns if axis.dense else -(-other.size // block),
            side=side if axis.dense else SIDE.diagonal,
            gram=axis.gram,
            copy=copy,
            trace=trace,
            spill=axis.spill,
            nonzero=nonzero,
        )
        grid = triangle_of(d, block) if axis.dense else grid_of(d, 1, block, block)
        self.job("grams", other.size if axis.dense else 0, grid, row)
        damped: Column = self.square(axis) if axis.dense else 0
        row_of_damped = Damped(
            gram=copy if axis.dense else axis.gram,
            factor=axis.old,
            output=damped,
            size=d,
            trace=trace,
            trace_count=across,
            nonzero=nonzero,
        )
        grid = grid_of(d, d if axis.dense else 1, block, block)
        self.job("damped", d if axis.dense else 0, grid, row_of_damped)
        if axis.dense:
            self.add_root(axis, copy, damped, nonzero)

    def add_root(self, axis: _Axis, residual: Column, damped: Column, nonzero: Tensor) -> None:
        """E takes the place of the copy of S."""
        d = axis.size
        triangle = triangle_of(d, self.block)
        norms, squares = (self.scratch(self.count, len(triangle), 4) for _ in range(2))
        of_e = Symmetric(
            a=axis.old, b=damped, output=residual, size=d, norms=norms, nonzero=nonzero
        )
        self.job("residuals", d, triangle, of_e)
        of_squares = Symmetric(
            a=residual, b=residual, output=0, size=d, norms=squares, nonzero=nonzero
        )
        self.job("squares", d, triangle, of_squares)
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
        self.job("roots", d, grid_of(d, d, self.block, self.block), row)

    def add_inverse(self, axis: _Axis) -> None:
        ragged = axis.kept and not axis.aligned
        row = Square(
            factor=axis.new,
            product=axis.product if axis.kept else axis.product_operand,
            size=axis.size,
            copy=axis.product_operand if ragged else 0,
            spill=axis.spill if ragged else 0,
            state=axis.factor if self.update and axis.aligned else 0,
        )
        self.job("inverses", axis.size, triangle_of(axis.size, self.block), row)

    def add_direction(
        self, bucket: ShampooBucket, axes: list[_Axis], ahead: Tensor, largest: Tensor
    ) -> None:
        left, right = axes
        rows, columns = bucket.sizes
        common: dict[str, Column] = {"m": rows, "n": columns, "member": self.member}
        # Y and Z have been read by then.
        rooms = [axis.seen for axis in axes if axis.dense] if self.update else []
        b, scale = ahead, largest
        if left.dense and right.dense:
            product = rooms.pop() if rooms else self.matrix()
            first = {"a": left.product_operand, "b": ahead, "output": product, "k": rows}
            self.direction("left", rows, common | first | {"largest": largest}, axes)
            a, b, depth, scale = product, right.product_operand, columns, torch.zeros_like(largest)
        elif left.dense:
            a, depth = left.product_operand, rows
        elif right.dense:
            a, b, depth = ahead, right.product_operand, columns
        else:
            a, depth = ahead, 0
        direction = ahead
        if depth > 0:
            direction = rooms.pop() if rooms else self.matrix()
        tiles = len(grid_of(rows, columns, self.block, self.block))
        across = -(-columns // self.block)
        tile_sums = self.scratch(self.count, tiles, 4)
        row_sums = averages = torch.zeros_like(ahead)
        if self.balanced:
            row_sums = self.scratch(self.count, across * rows, 4)
            averages = self.scratch(self.count, rows, 4)
        last = {
            "a": a, "b": b, "output": direction, "k": depth,
            "row_scales": left.scale, "column_scales": right.scale,
            "row_sums": row_sums, "tile_sums": tile_sums, "largest": scale, "averages": averages,
        }  # fmt: skip
        self.direction("directions", depth, common | last, axes)
        names = [_NAMES[dtype] for dtype in bucket.param_dtypes]
        descent = Descent(
            direction=direction,
            m=rows,
            n=columns,
            wide=int(self.wide),
            dtype=torch.tensor(names, device="cpu"),
            member=self.member,
            row_sums=row_sums,
            row_sums_count=across,
            tile_sums=tile_sums,
            tile_sums_count=tiles,
            averages=averages,
        )
        grid = grid_of(rows, columns, DESCENT_ROWS, DESCENT_TILES * GATHER_COLUMNS)
        self.job("descend", 0, grid, descent)

    def direction(
        self, name: str, cost: int, columns: dict[str, Column], axes: list[_Axis]
    ) -> None:
        row = Direction(**{field: columns.get(field, 0) for field in Direction._fields})
        grid = grid_of(axes[0].size, axes[1].size, self.block, self.block)
        self.job(name, cost, grid, row)
