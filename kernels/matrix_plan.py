"""What IF-Shampoo's launches are planned from (tilings, buckets), and what a plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import DeviceTable


class Tiling(NamedTuple):
    """How a GEMM is cut: tiles of block x block, operands staged block_k at a time."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str | None
    max_registers: int | None = None


class Bucket(NamedTuple):
    """Matrices of equal shapes, whose factor state is stacked; a list has a tensor an axis."""

    sizes: tuple[int, int]
    dense: tuple[bool, bool]
    places: tuple[int, ...]
    param_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    factors: Sequence[Tensor]
    residuals: Sequence[Tensor]
    momenta: Sequence[Tensor]
    products: Sequence[Tensor]


class Stack(NamedTuple):
    """GEMM operands of all members of a bucket: (members, rows, columns).

    source: a place in the scratch, or a field of the bucket and an axis. Not the tensor, which a
    plan would keep alive.
    """

    bucket: int
    source: int | tuple[str, int]
    shape: tuple[int, int, int]

    def tensor(self, buckets: Sequence[Bucket], scratch: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self.source, tuple):
            name, axis = self.source
            stack: Tensor = getattr(buckets[self.bucket], name)[axis]
            return stack
        _, rows, columns = self.shape
        strides = rows * columns, columns, 1
        return scratch.view(dtype).as_strided(self.shape, strides, self.source // dtype.itemsize)


# What a stacked kernel reads, each with whether the depth of the product runs along its rows.
Operands = tuple[tuple[Stack, bool], ...]


class Launch(NamedTuple):
    """Tiles [start, stop) of one launch.

    dtype: where its kernel takes one; operands: of a stacked kernel, empty for others.
    """

    start: int
    stop: int
    dtype: torch.dtype | None
    operands: Operands


class Product(NamedTuple):
    """out = A B, or A^T B, of every matrix of a bucket."""

    a: Stack
    b: Stack
    out: Stack
    transposed: bool


class Plan(NamedTuple):
    """What each launch computes, by name; a name may have several launches, or none."""

    jobs: DeviceTable
    tiles: DeviceTable
    launches: dict[str, list[Launch]]
    products: dict[str, list[Product]]
    scratch_bytes: int
