"""How the launches of a plan are called: kernels with their tables and descriptors, and cuBLAS."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .matrix_jobs import GATHER_COLUMNS, GATHER_ROWS
from .matrix_plan import (
    BucketOfMatrices,
    MatrixPlan,
    Operands,
    Stack,
    TileRange,
    Tiling,
    starts_aligned,
)
from .slots import Member
from .stacks import _stacked_kernel
from .tables import DTYPES, DeviceTable

GATHER_WARPS = 8
STACKED_PROGRAMS = 2  # of a stacked kernel, a multiprocessor

_lock = threading.Lock()  # two threads would each restore what the other has set


class Launches:
    """The launches of a plan, with the arguments that they share."""

    def __init__(
        self,
        plan: MatrixPlan,
        tiling: Tiling,
        dtype: torch.dtype,
        buckets: Sequence[BucketOfMatrices],
        scratch: Tensor,
        scalars: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        self.plan, self.tiling, self.dtype = plan, tiling, dtype
        self.buckets, self.scratch = buckets, scratch
        self.scalars, self.found_inf = scalars, found_inf
        self.jobs, self.tiles = plan.jobs.on_device(), plan.tiles.on_device()
        self.options = {"FACTOR": DTYPES[dtype], "enable_fp_fusion": True}
        self.gemm = self.options | {
            "BLOCK": tiling.block,
            "BLOCK_K": tiling.block_k,
            "num_warps": tiling.num_warps,
            "num_stages": tiling.num_stages,
            "maxnreg": tiling.max_registers,
        }

    def parts(self, name: str) -> Iterator[tuple[TileRange, int, tuple[Tensor, ...]]]:
        """Launches, with their tiles' number and the tables that every kernel takes first."""
        for part in self.plan.launches.get(name, ()):
            tiles = self.tiles[part.start : part.stop]
            yield part, len(tiles), (tiles, self.jobs, self.scratch)

    def elementwise(self, name: str, kernel: Any, *args: Any, **named: Any) -> None:
        """A launch without products."""
        blocks = {"BLOCK_M": GATHER_ROWS, "BLOCK_N": GATHER_COLUMNS, "num_warps": GATHER_WARPS}
        for part, count, tables in self.parts(name):
            options = blocks | named | self.options
            if part.dtype is not None:
                options["GRAD"] = DTYPES[part.dtype]
            kernel[(count,)](*tables, *args, **options)

    def launch(self, name: str, kernel: Any, *args: Any, finish: Any = None, **named: Any) -> None:
        """`kernel` finds its operands by the tables; of stacks it does what `finish` does."""
        for part, count, tables in self.parts(name):
            options = named | self.gemm
            if part.operands:
                self.launch_stacked(tables, count, part.operands, finish)
                continue
            if part.dtype is not None:
                options["PARAM"] = DTYPES[part.dtype]
            kernel[(count,)](*tables, *args, PRECISION=self.tiling.precision, **options)

    def launch_stacked(
        self, tables: tuple[Tensor, ...], count: int, operands: Operands, finish: Any
    ) -> None:
        a, b = operands[0], operands[-1]
        run = _stacked_kernel[(min(count, _programs(self.scratch.device)),)]
        shared = self.descriptor(*a), self.descriptor(*b), self.scalars, self.found_inf
        run(*tables, count, *shared, FINISH=finish, TRANS_B=not b[1], **self.gemm)

    def descriptor(self, stack: Stack, deep_rows: bool) -> TensorDescriptor:
        block, depth = self.tiling.block, self.tiling.block_k
        shape = [1, depth, block] if deep_rows else [1, block, depth]
        return TensorDescriptor.from_tensor(self.tensor(stack), shape)

    def tensor(self, stack: Stack) -> Tensor:
        return stack.tensor(self.buckets, self.scratch, self.dtype)

    def multiply(self, name: str) -> None:
        for a, b, out, transposed in self.plan.products.get(name, ()):
            first = self.tensor(a)
            bmm(first.mT if transposed else first, self.tensor(b), self.tensor(out))


def accessible(tensor: Tensor) -> Tensor:
    """The tensor where it is contiguous and starts aligned, else a copy that is and does."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor if starts_aligned(tensor) else tensor.clone()


def copy_back(
    tensors: Sequence[Tensor], results: Sequence[Tensor], buckets: Sequence[BucketOfMatrices]
) -> None:
    """Where `accessible` made copies."""
    for bucket in buckets:
        for i in bucket.indices:
            if results[i] is not tensors[i]:
                tensors[i].copy_(results[i])


def member_table(device: torch.device, lists: dict[str, Sequence[Tensor]]) -> DeviceTable:
    """A row of `slots.Member` for each of the tensors by column, of which each may be missing."""
    addresses = [tuple(map(Tensor.data_ptr, lists.get(name, ()))) for name in Member._fields]
    return _table_of(device, tuple(addresses))


@lru_cache(maxsize=64)
def _table_of(device: torch.device, addresses: tuple[tuple[int, ...], ...]) -> DeviceTable:
    nothing = (0,) * max(map(len, addresses))
    columns = [column or nothing for column in addresses]
    return DeviceTable(
        torch.tensor(columns, device="cpu", dtype=torch.int64).T.contiguous(), device
    )


@lru_cache(maxsize=64)
def _programs(device: torch.device) -> int:
    """How many programs of a stacked kernel a device holds."""
    if device.type != "cuda":
        return STACKED_PROGRAMS
    return STACKED_PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b for stacks of bfloat16 matrices; partial sums are never rounded to bfloat16."""
    with _wide_reductions():
        torch.bmm(a, b, out=out)


@contextmanager
def _wide_reductions() -> Iterator[None]:
    # PyTorch lets cuBLAS add up parts of a sum in bfloat16, unless a global setting forbids it.
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    with _lock:
        allowed = getattr(settings, name)
        split = getattr(settings, name + "_split_k", None)  # torch < 2.10 has one setting
        setattr(settings, name, False)
        try:
            yield
        finally:
            setattr(settings, name, allowed if split is None else (allowed, split))
