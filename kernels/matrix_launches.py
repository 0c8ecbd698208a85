"""How the launches of a plan are called: kernels with their tables and descriptors, and cuBLAS."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .calls import KnownKernels
from .matrix_gathers import GATHER_COLUMNS, GATHER_ROWS
from .matrix_plan import (
    BucketOfMatrices,
    MatrixPlan,
    Stack,
    TileRange,
    Tiling,
    grouped,
    starts_aligned,
)
from .slots import LAYOUT, MEMBER, Member
from .stacks import _stacked_kernel
from .tables import DTYPES, DeviceTable

GATHER_WARPS = 8
STACKED_PROGRAMS = 2  # of a stacked kernel, a multiprocessor

_lock = threading.Lock()  # two threads would each restore what the other has set


B = TypeVar("B", bound=BucketOfMatrices)
Part = tuple[TileRange, Tensor]  # of the tiles on the device


@dataclass
class PreparedMatrices:
    """A step of matrices of one device and GEMM dtype, but for the numbers that a call brings.

    Right while they and their state stay where and what they are; see `move_grads`.
    """

    device: torch.device
    dtype: torch.dtype
    tiling: Tiling
    plan: MatrixPlan
    buckets: Sequence[BucketOfMatrices]
    members: DeviceTable
    has_buffers: bool
    known: KnownKernels = field(default_factory=KnownKernels)
    _cut: tuple[Tensor, dict[str, list[Part]]] | None = None

    def parts(self) -> dict[str, list[Part]]:
        """The launches by name."""
        tiles = self.plan.tiles.on_device()
        if self._cut is None or self._cut[0] is not tiles:
            self._cut = (
                tiles,
                {
                    name: [(part, tiles[part.start : part.stop]) for part in parts]
                    for name, parts in self.plan.launches.items()
                },
            )
        return self._cut[1]


def prepared(
    buckets: Sequence[B],
    lists: dict[str, Sequence[Tensor]],
    parted: Callable[[torch.device, torch.dtype, Sequence[B]], list[Sequence[B]]],
    plan_of: Callable[[torch.device, torch.dtype, Sequence[B]], tuple[MatrixPlan, Tiling]],
) -> list[PreparedMatrices]:
    """A step of these buckets; `lists` are accessible, by the fields of `slots.Member`.

    parted: which buckets of a device and GEMM dtype share launches.
    """
    found = []
    for (device, dtype), members in grouped(buckets).items():
        table = member_table(device, lists)
        for part in parted(device, dtype, members):
            plan, tiling = plan_of(device, dtype, part)
            found.append(
                PreparedMatrices(device, dtype, tiling, plan, part, table, "buffer" in lists)
            )
    return found


def move_grads(
    steps: Sequence[PreparedMatrices], addresses: Tensor
) -> list[PreparedMatrices] | None:
    """The same step for gradients at other addresses, or None where one does not start aligned.

    addresses: int64, on the host, one a member of the caller's lists.
    """
    if (addresses % LAYOUT.alignment).any():
        return None
    found = []
    for step in steps:
        members = step.members.host.clone()
        members[:, MEMBER.grad] = addresses
        found.append(replace(step, members=DeviceTable(members, step.device)))
    return found


class Launches:
    """The launches of a step, with the arguments that they share.

    kind: `calls.kind_of` the tensors that may be missing.
    """

    def __init__(
        self,
        step: PreparedMatrices,
        kind: Hashable,
        scalars: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        self.step, self.kind, self._known = step, kind, step.known
        self.scalars, self.found_inf = scalars, found_inf
        self.scratch = torch.empty(step.plan.scratch_bytes, dtype=torch.uint8, device=step.device)
        self.jobs, self.parts = step.plan.jobs.on_device(), step.parts()

    def elementwise(self, name: str, kernel: Any, *args: Any, **named: Any) -> None:
        """A launch without products."""
        for i, (part, tiles) in enumerate(self.parts.get(name, ())):
            own = tiles, self.jobs, self.scratch, *args
            if self._known.repeat((name, i, self.kind), own):
                continue
            blocks = {"BLOCK_M": GATHER_ROWS, "BLOCK_N": GATHER_COLUMNS, "num_warps": GATHER_WARPS}
            options = blocks | named | self._options()
            if part.dtype is not None:
                options["GRAD"] = DTYPES[part.dtype]
            self._known.call((name, i, self.kind), kernel, part.count, own, options)

    def launch(self, name: str, kernel: Any, *args: Any, finish: Any = None, **named: Any) -> None:
        """`kernel` finds its operands by the tables; of stacks it does what `finish` does."""
        for i, (part, tiles) in enumerate(self.parts.get(name, ())):
            if part.operands:
                self.launch_stacked((name, i, self.kind), part, tiles, finish)
                continue
            own = tiles, self.jobs, self.scratch, *args
            if self._known.repeat((name, i, self.kind), own):
                continue
            options = named | self._options() | self._gemm()
            options["PRECISION"] = self.step.tiling.precision
            if part.dtype is not None:
                options["PARAM"] = DTYPES[part.dtype]
            self._known.call((name, i, self.kind), kernel, part.count, own, options)

    def launch_stacked(self, launch: Hashable, part: TileRange, tiles: Tensor, finish: Any) -> None:
        a, b = part.operands[0], part.operands[-1]
        shared = self.descriptor(*a), self.descriptor(*b), self.scalars, self.found_inf
        own = tiles, self.jobs, self.scratch, part.count, *shared
        if not self._known.repeat(launch, own):
            programs = min(part.count, _programs(self.step.device))
            options = {"FINISH": finish, "TRANS_B": not b[1]} | self._options() | self._gemm()
            self._known.call(launch, _stacked_kernel, programs, own, options)

    def _options(self) -> dict[str, Any]:
        return {"FACTOR": DTYPES[self.step.dtype], "enable_fp_fusion": True}

    def _gemm(self) -> dict[str, Any]:
        tiling = self.step.tiling
        return {
            "BLOCK": tiling.block,
            "BLOCK_K": tiling.block_k,
            "num_warps": tiling.num_warps,
            "num_stages": tiling.num_stages,
            "maxnreg": tiling.max_registers,
        }

    def descriptor(self, stack: Stack, deep_rows: bool) -> TensorDescriptor:
        block, depth = self.step.tiling.block, self.step.tiling.block_k
        shape = [1, depth, block] if deep_rows else [1, block, depth]
        return TensorDescriptor.from_tensor(self.tensor(stack), shape)

    def tensor(self, stack: Stack) -> Tensor:
        return stack.tensor(self.step.buckets, self.scratch, self.step.dtype)

    def multiply(self, name: str) -> None:
        for a, b, out, transposed in self.step.plan.products.get(name, ()):
            first = self.tensor(a)
            bmm(first.mT if transposed else first, self.tensor(b), self.tensor(out))


def accessible(tensor: Tensor) -> Tensor:
    """The tensor where it is contiguous and starts aligned, else a copy that is and does."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor if starts_aligned(tensor) else tensor.clone()


def are_accessible(lists: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether no tensor has to be copied; averages of rows may start anywhere."""
    return all(
        tensor.is_contiguous() and (name == "averages" or starts_aligned(tensor))
        for name, tensors in lists.items()
        for tensor in tensors
    )


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
