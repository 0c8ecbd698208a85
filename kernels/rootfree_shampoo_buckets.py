"""What a plan of root-free Shampoo is made of: buckets of equal matrices, axes, and their room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .matrix_axes import PanelledAxis
from .matrix_plan import PlanDraft, Stack
from .rootfree_shampoo_slots import DTYPE
from .slots import Column, padded

_NAMES = {
    torch.float32: DTYPE.float32,
    torch.bfloat16: DTYPE.bfloat16,
    torch.float16: DTYPE.float16,
}


class ShampooBucket(NamedTuple):
    """Matrices of equal shapes, whose state is stacked; a list of it has a tensor an axis."""

    sizes: tuple[int, int]
    dense: tuple[bool, bool]
    blocks: tuple[int, int]
    indices: tuple[int, ...]  # in the caller's lists
    param_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    grams: Sequence[Tensor]
    factors: Sequence[Tensor]
    residuals: Sequence[Tensor]
    products: Sequence[Tensor]  # empty where K K^T is not kept

    @property
    def state(self) -> list[Tensor]:
        lists = self.grams, self.factors, self.residuals, self.products
        return [stack for stacks in lists for stack in stacks]

    @property
    def key(self) -> tuple[Any, ...]:
        """All that a plan for it depends on."""
        return (*self[:6], *map(Tensor.data_ptr, self.state))


def names_of(dtypes: Sequence[torch.dtype]) -> Tensor:
    """As kernels read them, of the members of a bucket."""
    return torch.tensor([_NAMES[dtype] for dtype in dtypes], device="cpu")


class Axis(PanelledAxis):
    """An axis of a bucket; its operands are columns of addresses, zero where there is nothing."""

    seen: Column = 0  # Y or Z, or partial sums of squares of it
    spill: Column = 0  # room for the tiles of its launches, where rows are not aligned
    sums_count = 0  # of those partial sums of squares

    def __init__(self, size: int, stack: Tensor, aligned: bool, state: Sequence[Tensor]) -> None:
        super().__init__(size, stack)
        self.aligned = aligned
        self.gram, self.factor, self.residual, self.product = state
        self.old = self.new = self.factor  # for GEMMs to read, before and after the update
        self.kept = bool(self.product.any())
        self.product_operand = self.product

    @property
    def scale(self) -> Tensor:
        return torch.zeros_like(self.factor) if self.dense else self.factor


class BucketDraft(PlanDraft):
    """A plan, and room in the scratch for the bucket that is being added."""

    number: int
    stacked: bool  # whether its products are of whole stacks

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def begin(self, bucket: ShampooBucket, number: int, stacked: bool) -> None:
        self.number, self.stacked = number, stacked
        self.count, self.wide = len(bucket.indices), not any(bucket.dense)
        self.member = torch.tensor(bucket.indices, device="cpu")
        rows, columns = map(PanelledAxis, bucket.sizes, bucket.factors)
        self.row_length = columns.extent
        self.elements, self.itemsize = rows.extent * padded(columns.extent), self.dtype.itemsize

    def stack(self, scratch: Column, rows: int, columns: int) -> Stack:
        """Operands in the scratch."""
        assert isinstance(scratch, Tensor)
        return Stack(self.number, -1 - int(scratch[0]), (len(scratch), rows, columns))

    def state(self, name: str, n: int, axis: Axis) -> Stack:
        """Operands of axis n in the state."""
        return Stack(self.number, (name, n), (self.count, axis.size, axis.size))

    def square(self, axis: Axis, itemsize: int | None = None) -> Tensor:
        """Room for a (d, d) matrix of padded rows, or for all blocks of one."""
        elements = len(axis.panels) * axis.block * padded(axis.block)
        return self.scratch(self.count, elements, itemsize or self.itemsize)

    def matrix(self) -> Tensor:
        """Room for an (m, n) matrix of padded rows, and all padding of blocks."""
        return self.scratch(self.count, self.elements, 4 if self.wide else self.itemsize)
