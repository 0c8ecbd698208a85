"""The launches of root-free Shampoo that update S and K of an axis, a block of a factor a job."""

from __future__ import annotations

import torch

from .matrix_axes import Panel, moved
from .matrix_plan import Operands, grid_of, triangle_of
from .rootfree_shampoo_buckets import Axis, BucketDraft
from .rootfree_shampoo_slots import DAMPING, Damped, Gram, Root, Symmetric
from .slots import SIDE, Column, Square, padded


class UpdateDraft(BucketDraft):
    """A plan, with what follows Y and Z; `block` is the side of a tile."""

    def __init__(self, dtype: torch.dtype, block: int, update: bool) -> None:
        super().__init__(dtype)
        self.block, self.update = block, update

    def add_update(self, n: int, axis: Axis, other: Axis, columns: int, nonzero: Column) -> None:
        """S, then K, of axis n."""
        d, block = axis.block, self.block
        across = -(-d // block)
        trace = self.scratch(self.count, across * len(axis.panels), 4)
        copy, damped = (self.square(axis) if axis.dense else 0 for _ in range(2))
        for panel in axis.panels:
            first = panel.first * (1 if n else padded(columns)) * self.itemsize
            row = Gram(
                seen=moved(axis.seen, first),
                size=d,
                others=other.size,
                columns=columns if axis.dense else axis.sums_count,
                side=(SIDE.rows, SIDE.columns)[n] if axis.dense else SIDE.diagonal,
                gram=axis.square(axis.gram, panel, 4),
                copy=axis.square(copy, panel, self.itemsize),
                trace=moved(trace, 4 * across * panel.index),
                spill=axis.square(axis.spill, panel, 4),
                nonzero=nonzero,
            )
            grid = triangle_of(d, block) if axis.dense else grid_of(d, 1, block, block)
            self.job("grams", other.size if axis.dense else 0, grid, row)
            self.add_damped(axis, panel, copy, damped, trace, nonzero)
        if self.stacked:
            s, t = (self.stack(of, d, d) for of in (copy, damped))
            self.vendor("damped", s, self.state("factors", n, axis), t)
        if axis.dense:
            self.add_root(n, axis, copy, damped, nonzero)

    def add_damped(
        self,
        axis: Axis,
        panel: Panel,
        copy: Column,
        damped: Column,
        trace: Column,
        nonzero: Column,
    ) -> None:
        """T of a block, or a diagonal K; of stacks what T is a product of."""
        d, itemsize = axis.block, self.itemsize
        is_product = axis.dense and not self.stacked
        kinds = DAMPING.product if is_product else DAMPING.sum if axis.dense else DAMPING.root
        of_state = axis.square(axis.gram, panel, 4)
        row = Damped(
            damping=kinds,
            gram=axis.square(copy, panel, itemsize) if is_product else of_state,
            factor=axis.square(axis.old, panel, itemsize),
            output=axis.square(copy if self.stacked else damped, panel, itemsize),
            size=d,
            axis=axis.size,
            trace=trace,
            trace_count=axis.tiles(self.block),
            nonzero=nonzero,
        )
        grid = grid_of(d, d if is_product else 1, self.block, self.block)
        self.job("damped", d if is_product else 0, grid, row)

    def add_root(
        self, n: int, axis: Axis, residual: Column, damped: Column, nonzero: Column
    ) -> None:
        """E takes the place of the copy of S."""
        d, itemsize = axis.block, self.itemsize
        of_square: Operands = ()
        of_root: Operands = ()
        if self.stacked:
            k, e = self.state("factors", n, axis), self.stack(residual, d, d)
            of_square, of_root = ((e, False), (e, True)), ((k, False), (e, True))
        triangle = triangle_of(d, self.block)
        for panel in axis.panels:
            norms, squares = (self.scratch(self.count, len(triangle), 4) for _ in range(2))
            e_of = axis.square(residual, panel, itemsize)
            of_e = Symmetric(
                a=axis.square(axis.old, panel, itemsize),
                b=axis.square(damped, panel, itemsize),
                output=e_of,
                size=d,
                lives=panel.live,
                norms=norms,
                nonzero=nonzero,
            )
            self.job("residuals", d, triangle, of_e)
            of_squares = of_e._replace(a=e_of, b=e_of, output=0, norms=squares)
            self.job("squares", d, triangle, of_squares, operands=of_square)
            target = axis.new if axis.aligned else axis.factor
            row = Root(
                operand=axis.square(axis.old, panel, itemsize),
                residual=e_of,
                size=d,
                factor=axis.square(axis.factor, panel, itemsize),
                target=axis.square(target, panel, itemsize),
                low=axis.square(axis.residual, panel, 2),
                copy=0 if axis.aligned else axis.square(axis.new, panel, itemsize),
                norms=norms,
                squares=squares,
                norms_count=len(triangle),
                spill=axis.square(axis.spill, panel, 4),
                nonzero=nonzero,
            )
            grid = grid_of(d, d, self.block, self.block)
            self.job("roots", d, grid, row, operands=of_root)

    def add_inverse(self, n: int, axis: Axis) -> None:
        d, itemsize = axis.block, self.itemsize
        ragged = axis.kept and not axis.aligned
        operands: Operands = ()
        if self.stacked:
            of_update = self.stack(axis.new, d, d) if self.update else None
            operands = ((of_update or self.state("factors", n, axis), False),)
        product = axis.product if axis.kept else axis.product_operand
        in_state = axis.factor if self.update and axis.aligned else 0
        for panel in axis.panels:
            row = Square(
                factor=axis.square(axis.new, panel, itemsize),
                product=axis.square(product, panel, itemsize),
                size=d,
                copy=axis.square(axis.product_operand, panel, itemsize) if ragged else 0,
                spill=axis.square(axis.spill, panel, 4) if ragged else 0,
                state=axis.square(in_state, panel, itemsize),
            )
            self.job("inverses", d, triangle_of(d, self.block), row, operands=operands)
