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
from .slots import BESIDE, ROW, Beside, Row

_MAX_PLANS = 128
_STREAMS = 2  # of which a table keeps a copy
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# In fewer bytes: of residuals, and of states with those of their scales.
_RESIDUALS = (torch.int8, torch.int16)
_SCALES = {
    None: None,
    torch.float32: None,
    torch.bfloat16: None,
    torch.int8: torch.float32,
    torch.uint8: torch.uint8,
}
_STORED = DTYPES | {torch.int8: tl.int8, torch.int16: tl.int16, torch.uint8: tl.uint8}
_COLUMNS = 8  # of `_columns`


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


class Kept(NamedTuple):
    """What tensors in fewer bytes have beside parameters, gradients and states, entry by entry.

    A list of what their formats do not have is empty. scales: a list a state. seeds, firsts: of
    their random numbers, as reference/formats.py takes them.
    """

    residuals: Sequence[Tensor]
    scales: Sequence[Sequence[Tensor]]
    seeds: Sequence[int]
    firsts: Sequence[int]


class Dtypes(NamedTuple):
    """Of the tensors of a launch; None of what there is not."""

    param: tl.dtype
    grad: tl.dtype
    first_state: tl.dtype | None
    second_state: tl.dtype | None
    parts: tl.dtype | None
    residual: tl.dtype | None


class Launch(NamedTuple):
    """One launch: all tensors of a device and of the same dtypes.

    chunks: int32, (programs,); the row that a program works on. Elements of a row are cut into
        chunks of `block`, one a program, in order.
    rows: a `slots.Row` a tensor.
    beside: a `slots.Beside` a tensor, of tensors in fewer bytes.
    """

    device: torch.device
    dtypes: Dtypes
    chunks: DeviceTable
    rows: DeviceTable
    beside: DeviceTable | None
    programs: int


class LaunchPlan(NamedTuple):
    """Launches, or else the indices of tensors that have to go through contiguous copies first."""

    launches: list[Launch]
    copied: list[int]
    block: int  # elements of a chunk
    vector: int  # elements that an aligned chunk moves at once
    known: KnownKernels


_plans: dict[Any, LaunchPlan] = {}


def find_plan(
    lists: Sequence[Sequence[Tensor]],
    *,
    block: int,
    vector: int,
    kept: Kept | None = None,
    parts: Sequence[Tensor] = (),
) -> LaunchPlan:
    """The plan for params, grads and at most two lists of states; for sums and grads where none is.

    A row's chunks count as aligned where `vector` elements of each tensor can be moved at once.
    kept: of tensors in fewer bytes, whose blocks follow the order of their axes: all are contiguous
    there, or copied. parts: what is summed over micro-batches, if anything is.
    """
    every = _columns(lists, kept, parts) if kept or parts else lists
    addresses = tuple([tuple(map(Tensor.data_ptr, tensors)) for tensors in every])
    lengths = tuple(map(Tensor.numel, lists[0]))
    typed = lists[:2] if every is lists else every
    dtypes = tuple([tuple([t.dtype for t in tensors]) for tensors in typed])
    contiguous = all([all(map(Tensor.is_contiguous, tensors)) for tensors in every])
    layouts = () if contiguous else tuple([(t.shape, t.stride()) for ts in every for t in ts])
    random = None if kept is None else (tuple(kept.seeds), tuple(kept.firsts))
    key = (lists[0][0].device, addresses, lengths, dtypes, layouts, block, vector, random)
    plan = _plans.get(key)
    if plan is None:
        dense = _share_memory_order if kept is None else _are_contiguous
        rows = [] if contiguous else zip(*filter(None, every), strict=True)
        copied = [i for i, row in enumerate(rows) if not dense(row)]
        launches = [] if copied else _build(every, addresses, kept, lengths, block, vector)
        if len(_plans) >= _MAX_PLANS:
            del _plans[next(iter(_plans))]
        plan = _plans[key] = LaunchPlan(launches, copied, block, vector, KnownKernels())
    return plan


def _columns(
    lists: Sequence[Sequence[Tensor]], kept: Kept | None, parts: Sequence[Tensor]
) -> list[Sequence[Tensor]]:
    """Params, grads, two lists of states, parts, residuals, two of scales; empty where none are."""
    nothing: list[Sequence[Tensor]] = [()]
    kept = kept or Kept((), (), (), ())
    scales = [*kept.scales, *nothing * (2 - len(kept.scales))]
    return [*lists, *nothing * (4 - len(lists)), parts, kept.residuals, *scales]


def contiguous_copies(
    lists: Sequence[Sequence[Tensor]], copied: Sequence[int]
) -> list[list[Tensor]]:
    """The lists with contiguous copies at these indices."""
    dense = [list(tensors) for tensors in lists]
    for tensors in filter(None, dense):
        for i in copied:
            tensors[i] = tensors[i].contiguous()
    return dense


def copy_back(
    lists: Sequence[Sequence[Tensor]], dense: Sequence[Sequence[Tensor]], copied: Sequence[int]
) -> None:
    """What `contiguous_copies` copied, as it is now."""
    for tensors, results in zip(lists, dense, strict=True):
        for i in copied if tensors else ():
            if results[i] is not tensors[i]:
                tensors[i].copy_(results[i])


def _are_contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


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
    kept: Kept | None,
    lengths: tuple[int, ...],
    block: int,
    vector: int,
) -> list[Launch]:
    """The launches for lists as `_columns` has them, of which the last may be left out."""
    there = [i for i, tensors in enumerate(lists) if tensors]
    devices = [map(Tensor.get_device, lists[i]) for i in there]
    dtypes = [[t.dtype for t in lists[i]] for i in there]
    signatures = list(zip(*devices, *dtypes, strict=True))
    length = torch.tensor(lengths, device="cpu", dtype=torch.int64)
    nothing = torch.zeros_like(length)
    columns = [nothing] * _COLUMNS
    for i in there:
        columns[i] = torch.tensor(addresses[i], device="cpu", dtype=torch.int64)
    table, programs = _row_table(columns, length), (length + block - 1) // block
    more = None if kept is None else _beside_table(columns, kept)
    launches = []
    for signature in dict.fromkeys(signatures):
        sample = signatures.index(signature)
        typed: list[torch.dtype | None] = [None] * _COLUMNS
        for i, dtype in zip(there, signature[len(there) :], strict=True):
            typed[i] = dtype
        _check_signature(signature[: len(there)], typed, sample, kept is not None)
        device = lists[0][sample].device
        chosen = torch.tensor([other == signature for other in signatures], device="cpu")
        rows, counts = table[chosen], programs[chosen]
        rows[:, ROW.first_program] = counts.cumsum(0) - counts
        launch = Launch(
            device,
            Dtypes(*[dtype and _STORED[dtype] for dtype in typed[: len(Dtypes._fields)]]),
            _chunk_table(device, tuple(counts.tolist())),
            DeviceTable(rows, device),
            None if more is None else DeviceTable(more[chosen], device),
            int(counts.sum()),
        )
        _mark_aligned(rows, launch, block, vector)
        launches.append(launch)
    return launches


def _row_table(columns: Sequence[Tensor], length: Tensor) -> Tensor:
    param, grad, first, second, parts, *_ = columns
    nothing = torch.zeros_like(length)
    row = Row(
        param=param,
        grad=grad,
        first_state=first,
        second_state=second,
        parts=parts,
        length=length,
        first_program=nothing,
        aligned=nothing,
        index=torch.arange(len(length), device="cpu"),
    )
    return torch.stack(row, 1)


def _beside_table(columns: Sequence[Tensor], kept: Kept) -> Tensor:
    *_, residual, first_scales, second_scales = columns
    seed, first = (
        torch.tensor([number % 2**32 for number in numbers], device="cpu")
        for numbers in (kept.seeds, kept.firsts)
    )
    row = Beside(
        residual=residual,
        first_scales=first_scales,
        second_scales=second_scales,
        seed=seed,
        first_index=first,
    )
    return torch.stack(row, 1)


def _mark_aligned(rows: Tensor, launch: Launch, block: int, vector: int) -> None:
    """Write into the rows of a launch which of its chunks may promise alignment."""
    *dtypes, residual = launch.dtypes
    names = [ROW.param, ROW.grad, ROW.first_state, ROW.second_state, ROW.parts]
    sizes = [1 if dtype is None else dtype.primitive_bitwidth // 8 for dtype in dtypes]
    aligned = (rows[:, names] % (vector * torch.tensor(sizes, device="cpu")) == 0).all(1)
    if residual is not None and launch.beside is not None:
        addresses = launch.beside.host[:, BESIDE.residual]
        aligned &= addresses % (vector * residual.primitive_bitwidth // 8) == 0
    length = rows[:, ROW.length]
    rows[:, ROW.aligned] = torch.where(aligned, length // block * block, 0)


def at_gradients(plan: LaunchPlan, addresses: Tensor) -> LaunchPlan:
    """The plan for the same tensors, but gradients at these addresses; on the host, int64."""
    launches = []
    for launch in plan.launches:
        rows = launch.rows.host.clone()
        rows[:, ROW.grad] = addresses[rows[:, ROW.index]]
        _mark_aligned(rows, launch, plan.block, plan.vector)
        launches.append(launch._replace(rows=DeviceTable(rows, launch.device)))
    return plan._replace(launches=launches)


def _check_signature(
    devices: Sequence[int], dtypes: Sequence[torch.dtype | None], i: int, fewer_bytes: bool
) -> None:
    """Raise unless a kernel takes tensors on these devices, and columns of these dtypes."""
    if len(set(devices)) > 1:
        raise ValueError(
            f"params[{i}], its gradient and its state are on different devices: "
            f"{', '.join(map(str, devices))} (-1 is the CPU); move them to one"
        )
    param, grad, first, second, parts, residual, *scales = dtypes
    found = ", ".join(map(str, filter(None, dtypes)))
    if first is None and not fewer_bytes:  # of kernels/accumulate.py
        if param != torch.float32 or grad not in DTYPES or parts not in (param, None):
            raise TypeError(
                f"sums[{i}], its gradient and its part are {found}; the Triton kernel adds "
                "gradients in float32, bfloat16 or float16 to sums and parts in float32"
            )
        return
    taken = "state in float32"
    right = {first, second} <= {torch.float32, None}
    if fewer_bytes:
        wanted = [_SCALES.get(state, state) for state in (first, second)]
        right = first is not None and wanted == scales
        right &= residual is None or (param == torch.bfloat16 and residual in _RESIDUALS)
        taken += (
            ", bfloat16, int8 with float32 scales or uint8 with uint8 scales, and residuals in "
            "int8 or int16 of bfloat16 parameters"
        )
    right &= parts in (torch.float32, None)
    if param not in DTYPES or grad not in (param, torch.float32) or not right:
        raise TypeError(
            f"params[{i}], its gradient and its state are {found}; "
            "the Triton kernels take parameters in float32, bfloat16 or float16, gradients in the "
            f"same dtype or float32, and {taken}"
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
