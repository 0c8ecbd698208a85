"""Tables on the device, and launch plans: which programs of a diagonal launch update which tensors.

A plan is cached under everything that it was built from (addresses, lengths, dtypes, strides), so a
stale one is never found; when an address changes, the next step builds and sends a new one. Nothing
here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .calls import KnownKernels
from .slots import ROW, Row

_MAX_PLANS = 128
_STREAMS = 2  # of which a table keeps a copy
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# What launches under capture have used: a CUDA graph reads it at every replay. Kept for ever,
# unless the graph's owner keeps it (`captured_tables`).
_captured: list[Tensor] = []


@contextmanager
def captured_tables() -> Iterator[list[Tensor]]:
    """A list of what launches use that are captured within; whoever has the graph keeps it."""
    global _captured
    outer, _captured = _captured, []
    try:
        yield _captured
    finally:
        _captured = outer


class DeviceTable:
    """A small host tensor and its copy on one device.

    The copy is ordered with the work of the stream that was current when it was made, so another
    stream gets one of its own; the last two are kept. A copy that a capture finds is complete,
    because torch.cuda.graph synchronizes first; one that it has to make becomes a node of the
    graph, which reads the pinned memory at every replay (under capture torch refuses a copy from
    any other).
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host
        self._device = device
        self._copies: dict[int, Tensor] = {}  # by stream; replaced, never changed: for threads

    def on_device(self) -> Tensor:
        """The copy for the current stream; the current device is the table's."""
        if self._device.type == "cpu":
            return self.host
        if torch.cuda.is_current_stream_capturing():
            copy = next(iter(self._copies.values()), None)
            if copy is None:
                pinned = self.host.pin_memory()
                copy = pinned.to(self._device, non_blocking=True)
                _captured.append(pinned)
            _captured.append(copy)
            return copy
        stream = torch.cuda.current_stream(self._device).cuda_stream
        copy = self._copies.get(stream)
        if copy is None:
            copy = self.host.pin_memory().to(self._device, non_blocking=True)
            self._copies = dict([*self._copies.items(), (stream, copy)][-_STREAMS:])
        return copy


class Launch(NamedTuple):
    """One launch: all tensors of a device, a parameter dtype and a gradient dtype.

    chunks: int32, (programs,); the row that a program works on. Elements of a row are cut into
        chunks of `block`, one a program, in order.
    rows: a `slots.Row` a tensor.
    """

    device: torch.device
    param_dtype: tl.dtype
    grad_dtype: tl.dtype
    chunks: DeviceTable
    rows: DeviceTable
    programs: int


class LaunchPlan(NamedTuple):
    """Launches, or else the indices of tensors that have to go through contiguous copies first."""

    launches: list[Launch]
    copied: list[int]
    states: int  # lists of them
    known: KnownKernels


_plans: dict[Any, LaunchPlan] = {}


def find_plan(lists: Sequence[Sequence[Tensor]], *, block: int, vector: int) -> LaunchPlan:
    """The plan for params, grads and one or two lists of states.

    A row's chunks count as aligned where `vector` elements of each tensor can be moved at once.
    """
    addresses = tuple([tuple(map(Tensor.data_ptr, tensors)) for tensors in lists])
    lengths = tuple(map(Tensor.numel, lists[0]))
    dtypes = tuple([p.dtype for p in lists[0]]), tuple([g.dtype for g in lists[1]])
    contiguous = all([all(map(Tensor.is_contiguous, tensors)) for tensors in lists])
    layouts = () if contiguous else tuple([(t.shape, t.stride()) for ts in lists for t in ts])
    key = (lists[0][0].device, addresses, lengths, dtypes, layouts, block)
    plan = _plans.get(key)
    if plan is None:
        rows = [] if contiguous else zip(*lists, strict=True)
        copied = [i for i, row in enumerate(rows) if not _share_memory_order(row)]
        launches = [] if copied else _build(lists, addresses, lengths, block, vector)
        if len(_plans) >= _MAX_PLANS:
            del _plans[next(iter(_plans))]
        plan = _plans[key] = LaunchPlan(launches, copied, len(lists) - 2, KnownKernels())
    return plan


def _share_memory_order(tensors: Sequence[Tensor]) -> bool:
    """Whether equal offsets mean equal elements, and no tensor has gaps."""
    orders = {_memory_order(tensor) for tensor in tensors}
    return len(orders) == 1 and None not in orders


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of the axes that have any; None where the elements do not fill their memory."""
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    axes = [(stride, size) for stride, size in axes if size != 1]
    expected = 1
    for stride, size in sorted(axes):
        if stride != expected and tensor.numel() > 0:
            return None
        expected *= size
    return tuple([stride for stride, _ in axes])


def _build(
    lists: Sequence[Sequence[Tensor]],
    addresses: tuple[tuple[int, ...], ...],
    lengths: tuple[int, ...],
    block: int,
    vector: int,
) -> list[Launch]:
    devices = [map(Tensor.get_device, tensors) for tensors in lists]
    dtypes = [[t.dtype for t in tensors] for tensors in lists]
    signatures = list(zip(*devices, *dtypes, strict=True))
    param, grad, first, *second = torch.tensor(addresses, device="cpu", dtype=torch.int64)
    length = torch.tensor(lengths, device="cpu", dtype=torch.int64)
    nothing = torch.zeros_like(length)
    row = Row(
        param=param,
        grad=grad,
        first_state=first,
        second_state=second[0] if second else nothing,
        length=length,
        first_program=nothing,
        aligned=nothing,
        index=torch.arange(len(length), device="cpu"),
    )
    table, programs = torch.stack(row, 1), (length + block - 1) // block
    launches = []
    for signature in dict.fromkeys(signatures):
        sample = signatures.index(signature)
        _check_signature(signature[: len(lists)], signature[len(lists) :], sample)
        device, dtype, grad_dtype = lists[0][sample].device, *signature[len(lists) :][:2]
        chosen = torch.tensor([other == signature for other in signatures], device="cpu")
        rows, counts = table[chosen], programs[chosen]
        rows[:, ROW.first_program] = counts.cumsum(0) - counts
        _mark_aligned(rows, DTYPES[dtype], DTYPES[grad_dtype], block, vector)
        launches.append(
            Launch(
                device,
                DTYPES[dtype],
                DTYPES[grad_dtype],
                _chunk_table(device, tuple(counts.tolist())),
                DeviceTable(rows, device),
                int(counts.sum()),
            )
        )
    return launches


def _mark_aligned(rows: Tensor, param: tl.dtype, grad: tl.dtype, block: int, vector: int) -> None:
    sizes = {
        ROW.param: param.primitive_bitwidth // 8,
        ROW.grad: grad.primitive_bitwidth // 8,
        ROW.first_state: 4,
        ROW.second_state: 4,
    }
    alignments = vector * torch.tensor(list(sizes.values()), device="cpu")
    aligned = (rows[:, list(sizes)] % alignments == 0).all(1)
    length = rows[:, ROW.length]
    rows[:, ROW.aligned] = torch.where(aligned, length // block * block, 0)


def at_gradients(plan: LaunchPlan, addresses: Tensor, *, block: int, vector: int) -> LaunchPlan:
    """The plan for the same tensors, but gradients at these addresses; on the host, int64."""
    launches = []
    for launch in plan.launches:
        rows = launch.rows.host.clone()
        rows[:, ROW.grad] = addresses[rows[:, ROW.index]]
        _mark_aligned(rows, launch.param_dtype, launch.grad_dtype, block, vector)
        launches.append(launch._replace(rows=DeviceTable(rows, launch.device)))
    return plan._replace(launches=launches)


def _check_signature(devices: tuple[int, ...], dtypes: tuple[torch.dtype, ...], i: int) -> None:
    if len(set(devices)) > 1:
        raise ValueError(
            f"params[{i}], its gradient and its state are on different devices: "
            f"{', '.join(map(str, devices))} (-1 is the CPU); move them to one"
        )
    param, grad, *states = dtypes
    if param not in DTYPES or grad not in (param, torch.float32) or set(states) != {torch.float32}:
        raise TypeError(
            f"params[{i}], its gradient and its state are {', '.join(map(str, dtypes))}; the "
            "Triton kernels take parameters in float32, bfloat16 or float16, gradients in the same "
            "dtype or float32, and state in float32"
        )


@lru_cache(maxsize=64)
def _chunk_table(device: torch.device, programs: tuple[int, ...]) -> DeviceTable:
    rows = torch.arange(len(programs), device="cpu", dtype=torch.int32)
    return DeviceTable(rows.repeat_interleave(torch.tensor(programs, device="cpu")), device)


@lru_cache(maxsize=256)
def scalar_table(device: torch.device, scalars: tuple[float, ...]) -> DeviceTable:
    """The scalars, rounded to float32."""
    return DeviceTable(torch.tensor(scalars, device="cpu", dtype=torch.float32), device)


def readable(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor itself where it is on the device, so that a captured graph reads it live."""
    if tensor is None or tensor.device == device:
        return tensor
    if tensor.is_cpu:
        return DeviceTable(tensor.clone(), device).on_device()
    return tensor.to(device)
