"""Which matrices each launch of IF-Shampoo computes, where their operands are, and in which order.

A plan depends on where the factor state lies, on shapes and on dtypes, never on the addresses of
parameters, gradients and momentum buffers: those are looked up by place in a table of their own.
Everything that lives for one step alone lies in one scratch allocation, at places that the plan
fixes; a job names them by -1 - place, and anything else by address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .matrix_plan import Bucket, Launch, Operands, Plan, Product, Stack, Tiling
from .tables import DeviceTable
from .tiles import JOB_COLUMNS

# Tiles of the gather launch: rows are contiguous, so a warp reads 256 or 512 bytes of one.
GATHER_ROWS, GATHER_COLUMNS = 64, 128

# Tile rows that are worked on together, so that the operand columns stay in L2 meanwhile.
GROUP = 8


def padded(size: int) -> int:
    return -(-size // 8) * 8


def build_plan(
    buckets: Sequence[Bucket],
    stacked: Sequence[bool],
    dtype: torch.dtype,
    tiling: Tiling,
    device: torch.device,
    *,
    update: bool,
    refresh: bool,
) -> Plan:
    """The launches of one step: with new factors (update), or with new products alone (refresh).

    stacked: of each bucket, whether its factors and products are the stacked kernels'
    and its other products of two dense operands the vendor's; it must be aligned, with both
    factors dense.
    """
    builder = _Builder(dtype, tiling.block, update, update or refresh)
    for number, (bucket, is_stacked) in enumerate(zip(buckets, stacked, strict=True)):
        builder.add(bucket, number, is_stacked)
    return builder.finish(device)


class _Axis:
    """An axis of a bucket; its operands are columns of addresses, zero where there is nothing."""

    park: Any = 0  # room for the tiles of its launches, where rows are not aligned
    squares: Any = 0  # partial ||factor||_F^2
    squares_count = 0
    norms: Any = 0  # partial ||m||_F^2
    norms_count = 0
    told: Any = 0  # partial counts of the gradient's elements other than 0
    told_count = 0

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


_Key = tuple[str, "torch.dtype | None", Operands]  # of a launch


class _Builder:
    number: int  # of the bucket that is being added
    stacked: bool

    def __init__(self, dtype: torch.dtype, block: int, update: bool, products: bool) -> None:
        self.dtype, self.block = dtype, block
        self.update, self.products = update, products
        self.scratch_bytes = 0
        self.entries: dict[_Key, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        self.vendors: dict[str, list[Product]] = defaultdict(list)

    def scratch(self, count: int, elements: int, itemsize: int) -> Tensor:
        """Places for `count` arrays, as a job names them."""
        size = -(-elements * itemsize // 128) * 128
        places = self.scratch_bytes + size * torch.arange(count, device="cpu")
        self.scratch_bytes += size * count
        return -1 - places

    def job(
        self,
        name: str,
        cost: int,
        grid: Tensor,
        *columns: Any,
        dtype: Any = None,
        operands: Operands = (),
    ) -> None:
        """One job a matrix of a bucket; `cost` is the length of a program's loop."""
        count = max(len(c) for c in columns if isinstance(c, Tensor))
        table = torch.zeros(count, JOB_COLUMNS, device="cpu", dtype=torch.int64)
        for i, column in enumerate(columns):
            table[:, i] = column
        table[:, -1] = torch.arange(count, device="cpu")  # places in `operands`
        if count:
            self.entries[name, dtype, operands].append((cost, table, grid))

    def vendor(self, name: str, a: Stack, b: Stack, out: Stack, transposed: bool = False) -> None:
        self.vendors[name].append(Product(a, b, out, transposed))

    def stack(self, places: Tensor, rows: int, columns: int) -> Stack:
        """Operands in the scratch."""
        return Stack(self.number, -1 - int(places[0]), (len(places), rows, columns))

    def state(self, name: str, n: int, axis: _Axis) -> Stack:
        """Operands of axis n in the state."""
        return Stack(self.number, (name, n), (len(axis.factor), axis.size, axis.size))

    def add(self, bucket: Bucket, number: int, stacked: bool) -> None:
        self.number, self.stacked = number, stacked
        axes = [self.axis(bucket, 0), self.axis(bucket, 1)]
        rows, columns = bucket.sizes
        count, neither = len(bucket.places), not any(bucket.dense)
        itemsize = self.dtype.itemsize
        elements = rows * padded(columns)
        gradient = self.scratch(count, elements, 4 if neither else itemsize)
        told, told_count = torch.zeros(count, device="cpu", dtype=torch.int64), 0
        if self.update:
            told_count = len(_grid(rows, columns, GATHER_ROWS, GATHER_COLUMNS))
            told = self.scratch(count, told_count, 4)
        for axis in axes:
            axis.told, axis.told_count = told, told_count
        for dtype in dict.fromkeys(bucket.grad_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.grad_dtypes], device="cpu")
            places = torch.tensor(bucket.places, device="cpu")[chosen]
            kind = 2 if neither else 1
            self.gather(places, gradient[chosen], rows, columns, told[chosen], kind, False, dtype)
        half = self.scratch(count, elements, itemsize) if all(bucket.dense) else gradient
        if self.update:
            self.add_update(axes, gradient, half)
        if self.products:
            for n, axis in enumerate(axes):
                self.add_products(n, axis)
        self.add_step(bucket, axes, gradient, half)

    def axis(self, bucket: Bucket, n: int) -> _Axis:
        """The operands of an axis, and the copies that they need."""
        size, dense, count = bucket.sizes[n], bucket.dense[n], len(bucket.places)
        stacks = bucket.factors[n], bucket.residuals[n], bucket.momenta[n], bucket.products[n]
        aligned = size % 8 == 0 and all(stack.data_ptr() % 16 == 0 for stack in stacks)
        axis = _Axis(size, dense, aligned, [_addresses(stack, count) for stack in stacks])

        def copy(itemsize: int = self.dtype.itemsize) -> Tensor:
            return self.scratch(count, size * padded(size), itemsize)

        if axis.copied:
            axis.product_operand = copy()
            if self.products:
                axis.new, axis.park = copy(), copy(itemsize=4)
            if self.update:
                axis.momentum_operand = copy()
            elif self.products:
                self.gather(axis.factor, axis.new, size, size, 0, 0, False)
            else:
                self.gather(axis.product, axis.product_operand, size, size, 0, 0, False)
        if self.update:
            tiles = -(-size // self.block)
            axis.norms_count = tiles * (tiles + 1) // 2 if dense else tiles
            axis.norms = self.scratch(count, axis.norms_count, 4)
        if self.update and dense:
            axis.old = copy()
            axis.squares_count = len(_grid(size, size, GATHER_ROWS, GATHER_COLUMNS))
            axis.squares = self.scratch(count, axis.squares_count, 4)
            self.gather(axis.factor, axis.old, size, size, axis.squares, 0, aligned)
        return axis

    def gather(
        self,
        source: Tensor,
        target: Tensor,
        rows: int,
        columns: int,
        sums: Any,
        kind: int,
        aligned: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = _grid(rows, columns, GATHER_ROWS, GATHER_COLUMNS)
        operands = source, target, rows, columns, sums, kind, int(aligned)
        self.job("gather", 0, grid, *operands, dtype=dtype)

    def add_update(self, axes: list[_Axis], gradient: Tensor, half: Tensor) -> None:
        left, right = axes
        rows, columns = left.size, right.size
        count, block = len(gradient), self.block
        grid = _grid(rows, columns, block, block)
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
            g, t, m = (self.stack(s, rows, columns) for s in (gradient, half, transformed))
            self.vendor("left", self.state("factors", 0, left), g, t, transposed=True)
            self.vendor("right", t, self.state("factors", 1, right), m)
        else:
            self.add_transformed(axes, grid, gradient, half, transformed, sums)
        for n, axis in enumerate(axes):
            gram = transformed, axis.size, axes[1 - n].size, columns, n
            if not axis.dense:
                gram = sums[n], axis.size, axes[1 - n].size, across[1 - n], 2
            self.add_factor(n, axis, axes[1 - n], *gram)

    def add_transformed(
        self, axes: list[_Axis], grid: Tensor, gradient: Any, half: Any, transformed: Any, sums: Any
    ) -> None:
        left, right = axes
        rows, columns = left.size, right.size
        if left.dense:
            operands = left.old, rows, gradient, columns, half if right.dense else transformed, 0
            scales = (0, 0, 0, 0) if right.dense else (0, right.scale, 0, sums[1])
            self.job("left", rows, grid, *operands, rows, columns, rows, *scales)
        if right.dense or not left.dense:
            depth = columns if right.dense else 0
            operands = half if left.dense else gradient, columns, right.old, columns, transformed, 0
            scales = left.scale, right.scale, *sums
            self.job("right", depth, grid, *operands, rows, columns, depth, *scales)

    def add_factor(self, n: int, axis: _Axis, other: _Axis, *gram: Any) -> None:
        d, block = axis.size, self.block
        trace = other.factor, other.size, 1
        if other.dense:
            trace = other.squares, other.squares_count, 0
        copy = axis.momentum_operand if axis.copied else 0
        grid = _triangle(d, block) if axis.dense else _grid(d, 1, block, block)
        cost = d + other.size if axis.dense else 0
        told = axis.told, axis.told_count
        columns = axis.old, *gram, axis.momentum, copy, *trace, axis.norms, axis.park, *told
        self.job("momenta", cost, grid, *columns)

        copy = axis.new if axis.copied else 0
        kind = int(axis.aligned) if axis.dense else 2
        grid = _grid(d, d if axis.dense else 1, block, block)
        columns = axis.old, axis.momentum_operand, d, axis.factor, axis.residual, copy
        columns = *columns, axis.norms, axis.norms_count, kind, axis.park, *told
        operands: Operands = ()
        if self.stacked:
            operands = (self.stack(axis.old, d, d), False), (self.state("momenta", n, axis), True)
        self.job("factors", d if axis.dense else 0, grid, *columns, operands=operands)

    def add_products(self, n: int, axis: _Axis) -> None:
        if axis.dense:
            copy = axis.product_operand if axis.copied else 0
            columns = axis.new, axis.product, axis.size, copy, axis.park
            grid = _triangle(axis.size, self.block)
            operands = ((self.state("factors", n, axis), False),) if self.stacked else ()
            self.job("products", axis.size, grid, *columns, operands=operands)

    def add_step(self, bucket: Bucket, axes: list[_Axis], gradient: Tensor, half: Tensor) -> None:
        left, right = axes
        rows, columns = bucket.sizes
        grid = _grid(rows, columns, self.block, self.block)
        park: Any = 0
        if any(bucket.dense) and columns % 8:
            park = self.scratch(len(gradient), rows * padded(columns), 4)
        if left.dense:
            operands, depth = (left.product_operand, rows, gradient, columns), rows
        if self.stacked:
            g, v = (self.stack(s, rows, columns) for s in (gradient, half))
            self.vendor("precondition", self.state("products", 0, left), g, v)
        elif left.dense and right.dense:
            self.job("precondition", rows, grid, *operands, half, 0, rows, columns, rows)
        if right.dense:
            operands, depth = (half, columns, right.product_operand, columns), columns
        if not any(bucket.dense):
            operands, depth, park = (gradient, columns, gradient, columns), 0, gradient
        scales = left.scale, right.scale, park
        for dtype in dict.fromkeys(bucket.param_dtypes):
            chosen = torch.tensor([other == dtype for other in bucket.param_dtypes], device="cpu")
            places = torch.tensor(bucket.places, device="cpu")
            job = *operands, places, 0, rows, columns, depth, *scales
            job = [c[chosen] if isinstance(c, Tensor) else c for c in job]
            self.job("params", depth, grid, *job, dtype=dtype)

    def finish(self, device: torch.device) -> Plan:
        """Join the tables; the longest programs of a launch start first."""
        copies = self.entries.pop(("gather", None, ()), [])
        first = next(key for key in self.entries if key[0] == "gather")
        self.entries[first] += copies
        jobs, tiles = [], []
        launches: dict[str, list[Launch]] = defaultdict(list)
        job_count = tile_count = 0
        for (name, dtype, operands), entries in self.entries.items():
            start = tile_count
            for _, table, grid in sorted(entries, key=lambda entry: -entry[0]):
                indices = torch.arange(job_count, job_count + len(table), device="cpu")
                indices = indices.repeat_interleave(len(grid))[:, None]
                tiles.append(torch.cat([indices, grid.repeat(len(table), 1)], 1).int())
                jobs.append(table)
                job_count += len(table)
                tile_count += len(indices)
            launches[name].append(Launch(start, tile_count, dtype, operands))
        tables = DeviceTable(torch.cat(jobs), device), DeviceTable(torch.cat(tiles), device)
        return Plan(*tables, dict(launches), dict(self.vendors), self.scratch_bytes)


def _addresses(stack: Tensor, count: int) -> Tensor:
    """The address of each matrix of a stack; zeros for an empty one."""
    step = stack.stride(0) * stack.itemsize if stack.numel() else 0
    return stack.data_ptr() * bool(step) + step * torch.arange(count, device="cpu")


@lru_cache(maxsize=256)
def _grid(rows: int, columns: int, block_rows: int, block_columns: int) -> Tensor:
    """(tiles, 3): row, column and place of the tiles of a matrix, in groups of rows."""
    shape = -(-rows // block_rows), -(-columns // block_columns)
    row, column = torch.meshgrid(*(torch.arange(n, device="cpu") for n in shape), indexing="ij")
    return _ordered(row.flatten(), column.flatten())


@lru_cache(maxsize=256)
def _triangle(size: int, block: int) -> Tensor:
    """As `_grid`, for the tiles on and below the diagonal."""
    count = -(-size // block)
    row, column = torch.tril_indices(count, count, device="cpu")
    return _ordered(row, column)


def _ordered(row: Tensor, column: Tensor) -> Tensor:
    width = int(column.max()) + 1
    order = torch.argsort((row // GROUP * width + column) * GROUP + row % GROUP)
    return torch.stack([row[order], column[order], torch.arange(len(row), device="cpu")], 1)
