"""What launches of matrix methods are planned from, what a plan says, how it is put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .slots import LAYOUT, TILE, Column, Tile
from .tables import DeviceTable

# Tile rows that are worked on together, so that the operand columns stay in L2 meanwhile.
GROUP = 8
MAX_PLANS = 32  # that a launcher keeps


class Tiling(NamedTuple):
    """How a GEMM is cut: tiles of block x block, operands staged block_k at a time."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str | None
    max_registers: int | None = None


class BucketOfMatrices(Protocol):
    """What a bucket of any matrix method has: matrices of equal shapes, their state stacked."""

    @property
    def sizes(self) -> tuple[int, int]: ...
    @property
    def dense(self) -> tuple[bool, bool]: ...
    @property
    def blocks(self) -> tuple[int, int]:
        """The sides of the blocks of each axis' factor; its size where it has none."""
        ...

    @property
    def indices(self) -> tuple[int, ...]:
        """In the caller's lists."""
        ...

    @property
    def factors(self) -> Sequence[Tensor]:
        """A stack an axis."""
        ...


_Bucket = TypeVar("_Bucket", bound=BucketOfMatrices)


def grouped(buckets: Sequence[_Bucket]) -> dict[tuple[torch.device, torch.dtype], list[_Bucket]]:
    """Buckets that share launches: by device and by the dtype of their GEMMs."""
    groups: dict[tuple[torch.device, Any], list[_Bucket]] = defaultdict(list)
    for bucket in buckets:
        dense = zip(bucket.factors, bucket.dense, strict=True)
        dtype = next((factor.dtype for factor, is_dense in dense if is_dense), None)
        groups[bucket.factors[0].device, dtype].append(bucket)
    for device in {device for device, _ in groups}:
        # Without a dense factor there is no GEMM, and any launch will do.
        diagonal = groups.pop((device, None), [])
        dtypes = [dtype for other, dtype in groups if other == device] or [torch.float32]
        groups[device, dtypes[0]].extend(diagonal)
    return groups


def flops_of(bucket: BucketOfMatrices, block: int) -> int:
    """FLOPs of an update of IF-Shampoo in tiles of block x block, whatever they have of use."""
    total = 0
    counts = [-(-d // b) for d, b in zip(bucket.sizes, bucket.blocks, strict=True)]
    across = [-(-b // block) for b in bucket.blocks]
    for n, (b, dense) in enumerate(zip(bucket.blocks, bucket.dense, strict=True)):
        if dense:
            triangle = across[n] * (across[n] + 1) // 2
            tiles = counts[0] * across[0] * counts[1] * across[1]
            total += 2 * tiles * b  # two products with G
            total += counts[n] * (triangle * (2 * b + bucket.sizes[1 - n]) + across[n] ** 2 * b)
    return 2 * block**2 * total * len(bucket.indices)


class MatrixBucket(NamedTuple):
    """Matrices of equal shapes, whose factor state is stacked; a list has a tensor an axis.

    joint_norms: whether all blocks of an axis are bounded by the norm of the whole factor.
    """

    sizes: tuple[int, int]
    dense: tuple[bool, bool]
    blocks: tuple[int, int]
    joint_norms: tuple[bool, bool]
    indices: tuple[int, ...]  # in the caller's lists
    param_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    factors: Sequence[Tensor]
    residuals: Sequence[Tensor]
    momenta: Sequence[Tensor]
    products: Sequence[Tensor]

    @property
    def members(self) -> tuple[Any, ...]:
        """All but where the state is."""
        return self[:7]

    @property
    def state(self) -> list[Tensor]:
        lists = self.factors, self.residuals, self.momenta, self.products
        return [stack for stacks in lists for stack in stacks]


def starts_aligned(tensor: Tensor) -> bool:
    """Whether a tensor has the alignment that kernels promise the compiler."""
    return tensor.data_ptr() % LAYOUT.alignment == 0


def addresses_of(stack: Tensor, count: int) -> Tensor:
    """The address of each matrix of a stack; zeros for an empty one."""
    step = stack.stride(0) * stack.itemsize if stack.numel() else 0
    return stack.data_ptr() * bool(step) + step * torch.arange(count, device="cpu")


class Stack(NamedTuple):
    """GEMM operands of all members of a bucket: (members, rows, columns).

    source: a byte of the scratch, or a field of the bucket and an axis. Not the tensor, which a
    plan would keep alive.
    """

    bucket: int
    source: int | tuple[str, int]
    shape: tuple[int, int, int]

    def tensor(
        self, buckets: Sequence[BucketOfMatrices], scratch: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(self.source, tuple):
            name, axis = self.source
            stack: Tensor = getattr(buckets[self.bucket], name)[axis]
            return stack
        _, rows, columns = self.shape
        strides = rows * columns, columns, 1
        return scratch.view(dtype).as_strided(self.shape, strides, self.source // dtype.itemsize)


# What a stacked kernel reads, each with whether the depth of the product runs along its rows.
Operands = tuple[tuple[Stack, bool], ...]


class TileRange(NamedTuple):
    """A launch: tiles [start, stop) of the plan's.

    dtype: where its kernel takes one; operands: of a stacked kernel, empty for others.
    """

    start: int
    stop: int
    dtype: torch.dtype | None
    operands: Operands

    @property
    def count(self) -> int:
        return self.stop - self.start


class StackProduct(NamedTuple):
    """out = A B, or A^T B, of every matrix of a bucket."""

    a: Stack
    b: Stack
    out: Stack
    transposed: bool


class MatrixPlan(NamedTuple):
    """What each launch computes, by name; a name may have several launches, or none."""

    jobs: DeviceTable
    tiles: DeviceTable
    launches: dict[str, list[TileRange]]
    products: dict[str, list[StackProduct]]
    scratch_bytes: int


Job = tuple[Column, ...]  # a row of kernels/slots.py or kernels/rootfree_shampoo_slots.py
_Key = tuple[str, "torch.dtype | None", Operands]  # of a launch


def kept_plan(
    plans: dict[Any, MatrixPlan], key: tuple[Any, ...], build: Callable[[], MatrixPlan]
) -> MatrixPlan:
    """The plan under this key, built where there is none; the oldest of `MAX_PLANS` goes."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MAX_PLANS:
            del plans[next(iter(plans))]
        plan = plans[key] = build()
    return plan


class PlanDraft:
    """Jobs by launch, products by the vendor's library, and the scratch that they need."""

    def __init__(self) -> None:
        self.scratch_bytes = 0
        self.entries: dict[_Key, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        self.vendors: dict[str, list[StackProduct]] = defaultdict(list)

    def scratch(self, count: int, elements: int, itemsize: int) -> Tensor:
        """Room for `count` arrays, as a job names it."""
        size = -(-elements * itemsize // 128) * 128
        first_bytes = self.scratch_bytes + size * torch.arange(count, device="cpu")
        self.scratch_bytes += size * count
        return -1 - first_bytes

    def job(
        self,
        name: str,
        cost: int,
        grid: Tensor,
        row: Job,
        *,
        dtype: torch.dtype | None = None,
        operands: Operands = (),
    ) -> None:
        """One job a matrix of a bucket; `cost` is the length of a program's loop."""
        count = max(len(c) for c in row if isinstance(c, Tensor))
        table = torch.zeros(count, LAYOUT.job_columns, device="cpu", dtype=torch.int64)
        for column, values in enumerate(row):
            table[:, column] = values
        table[:, LAYOUT.matrix] = torch.arange(count, device="cpu")
        if count:
            self.entries[name, dtype, operands].append((cost, table, grid))

    def vendor(self, name: str, a: Stack, b: Stack, out: Stack, transposed: bool = False) -> None:
        self.vendors[name].append(StackProduct(a, b, out, transposed))

    def finish(self, device: torch.device) -> MatrixPlan:
        """Join the tables; the longest programs of a launch start first."""
        jobs, tiles = [], []
        launches: dict[str, list[TileRange]] = defaultdict(list)
        job_count = tile_count = 0
        for (name, dtype, operands), entries in self.entries.items():
            start = tile_count
            for _, table, grid in sorted(entries, key=lambda entry: -entry[0]):
                numbers = torch.arange(job_count, job_count + len(table), device="cpu")
                part = grid.repeat(len(table), 1)
                part[:, TILE.job] = numbers.repeat_interleave(len(grid))
                tiles.append(part.int())
                jobs.append(table)
                job_count += len(table)
                tile_count += len(part)
            launches[name].append(TileRange(start, tile_count, dtype, operands))
        tables = DeviceTable(torch.cat(jobs), device), DeviceTable(torch.cat(tiles), device)
        return MatrixPlan(*tables, dict(launches), dict(self.vendors), self.scratch_bytes)


@lru_cache(maxsize=256)
def grid_of(rows: int, columns: int, block_rows: int, block_columns: int) -> Tensor:
    """The tiles of a matrix, (tiles, columns of `Tile`), in groups of rows; their job is open."""
    shape = -(-rows // block_rows), -(-columns // block_columns)
    row, column = torch.meshgrid(*(torch.arange(n, device="cpu") for n in shape), indexing="ij")
    return _ordered(row.flatten(), column.flatten())


@lru_cache(maxsize=256)
def triangle_of(size: int, block: int) -> Tensor:
    """As `grid_of`, for the tiles on and below the diagonal."""
    count = -(-size // block)
    row, column = torch.tril_indices(count, count, device="cpu")
    return _ordered(row, column)


def _ordered(row: Tensor, column: Tensor) -> Tensor:
    width = int(column.max()) + 1
    order = torch.argsort((row // GROUP * width + column) * GROUP + row % GROUP)
    index = torch.arange(len(row), device="cpu")
    tile = Tile(job=torch.zeros_like(index), row=row[order], column=column[order], index=index)
    return torch.stack(tile, 1)
