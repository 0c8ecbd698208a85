"""Weights and states in fewer bytes as float32 tensors, and back: one launch for all of a call.

    unpack_     values <- what is stored, with its residual or scales
    pack_       what is stored, with its residual or scales <- values

By formats.py on registers, to the bits of reference/formats.py. Shapes: lists of tensors, entry by
entry of one shape, but for scales, which are one a block of 256. Dtypes: values float32; stored
bfloat16 beside an int8 or int16 residual, or rounded stochastically with nothing beside, int8
beside float32 scales, uint8 beside uint8 scales, and float32 and float16. Bytes an element, read
and written: 7 of bfloat16 with int8 residuals, 8 with int16, 6 without; 5 of 8 bits, and 4/256 or
1/256 for the scales.

As in lowbit.py, the step's count is read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import skips
from .diag import call_launches
from .formats import (
    decoded,
    join_weight,
    key_of,
    load_state,
    scales_at,
    split_weight,
    store_state,
)
from .lowbit import BLOCK, CHUNK, vector_of
from .slots import BESIDE, ROW
from .tables import Kept, Launch, LaunchPlan, contiguous_copies, copy_back, find_plan, readable


@triton.jit
def _convert_chunk(
    stored_ptr,
    residual_ptr,
    scale_ptr,
    value_ptr,
    left,
    first_index,
    key,
    STREAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.arange(0, CHUNK // BLOCK)[:, None]
    offs = blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, block_mask = None, None
    if left is not None:
        mask, block_mask = offs < left, blocks * BLOCK < left
    if STREAM is None:
        stored, scale = load_state(stored_ptr, scale_ptr, offs, blocks, mask, block_mask)
        if residual_ptr is not None:
            value = join_weight(stored, tl.load(residual_ptr + offs, mask=mask))
        else:
            value = decoded(stored, scale)
        tl.store(value_ptr + offs, value, mask=mask)
    else:
        value = tl.load(value_ptr + offs, mask=mask).to(tl.float32)
        if residual_ptr is not None:
            high, residual = split_weight(value, residual_ptr.dtype.element_ty)
            tl.store(stored_ptr + offs, high, mask=mask)
            tl.store(residual_ptr + offs, residual, mask=mask)
        else:
            index = first_index + offs.to(tl.uint32)
            store_state(
                stored_ptr, scale_ptr, value, key, STREAM, index, offs, blocks, mask, block_mask
            )


@triton.jit(do_not_specialize_on_alignment=["steps_ptr", "found_inf_ptr"])
def _convert_kernel(
    chunks_ptr,
    rows_ptr,
    beside_ptr,
    steps_ptr,
    found_inf_ptr,
    STREAM: tl.constexpr,
    STORED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """STREAM: of the random numbers by which values are packed; None where they are unpacked."""
    if skips(found_inf_ptr):
        return
    pid = tl.program_id(0)
    row = tl.load(chunks_ptr + pid)
    row_ptr, more_ptr = rows_ptr + len(ROW) * row, beside_ptr + len(BESIDE) * row
    start = (pid - tl.load(row_ptr + ROW.first_program)) * CHUNK
    column = ROW.param
    if STORED.primitive_bitwidth == 8:
        column = ROW.first_state
    stored_ptr = tl.load(row_ptr + column).to(tl.pointer_type(STORED)) + start
    scale_ptr = scales_at(more_ptr + BESIDE.first_scales, stored_ptr, start // BLOCK)
    value_ptr = tl.load(row_ptr + ROW.grad).to(tl.pointer_type(VALUE)) + start
    residual_ptr, key, first_index = None, None, None
    if RESIDUAL is not None:
        residual_ptr = tl.load(more_ptr + BESIDE.residual).to(tl.pointer_type(RESIDUAL)) + start
    if STREAM is not None:
        step = tl.load(steps_ptr + tl.load(row_ptr + ROW.index))
        key = key_of(tl.load(more_ptr + BESIDE.seed), step)
        first_index = (tl.load(more_ptr + BESIDE.first_index) + start).to(tl.uint32)

    # As in diag.py: only aligned full chunks may promise alignment.
    if start < tl.load(row_ptr + ROW.aligned):
        stored_ptr = tl.multiple_of(stored_ptr, VECTOR * STORED.primitive_bitwidth // 8)
        value_ptr = tl.multiple_of(value_ptr, VECTOR * VALUE.primitive_bitwidth // 8)
        if RESIDUAL is not None:
            residual_ptr = tl.multiple_of(residual_ptr, VECTOR * RESIDUAL.primitive_bitwidth // 8)
        _convert_chunk(
            stored_ptr,
            residual_ptr,
            scale_ptr,
            value_ptr,
            None,
            first_index,
            key,
            STREAM,
            CHUNK,
            BLOCK,
        )
    else:
        _convert_chunk(
            stored_ptr,
            residual_ptr,
            scale_ptr,
            value_ptr,
            tl.load(row_ptr + ROW.length) - start,
            first_index,
            key,
            STREAM,
            CHUNK,
            BLOCK,
        )


@torch.no_grad()
def unpack_(values: Sequence[Tensor], stored: Sequence[Tensor], beside: Sequence[Tensor]) -> None:
    """The operator of this name. Tensors that are not contiguous go through copies."""
    nothing = [0] * len(stored)
    _convert([stored, beside, values], vector_of([values]), nothing, nothing)


@torch.no_grad()
def pack_(
    stored: Sequence[Tensor],
    beside: Sequence[Tensor],
    values: Sequence[Tensor],
    steps: Tensor,
    *,
    seeds: Sequence[int],
    firsts: Sequence[int],
    stream: int,
    found_inf: Tensor | None = None,
) -> None:
    """The operator of this name; steps and found_inf as `diag.launch` takes them."""
    numbers = steps.contiguous(), found_inf
    _convert([stored, beside, values], vector_of([stored]), seeds, firsts, stream, numbers)


def _convert(
    lists: list[Sequence[Tensor]],
    vector: int,
    seeds: Sequence[int],
    firsts: Sequence[int],
    stream: int | None = None,
    numbers: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Pack by a stream of random numbers, or unpack without one.

    lists: stored, beside, values. numbers: steps and found_inf.
    """
    if not lists[0]:
        return

    def pointers(device: torch.device) -> tuple[Tensor | None, ...]:
        return tuple([readable(number, device) for number in numbers])

    plan = _find_plan(*lists, vector, seeds, firsts)
    dense, copied = lists, plan.copied
    if copied:
        dense = contiguous_copies(lists, copied)
        plan = _find_plan(*dense, vector, seeds, firsts)
    call_launches(_convert_kernel, plan, pointers, partial(_constants, stream, vector), stream)
    written = slice(2, 3) if stream is None else slice(0, 2)
    copy_back(lists[written], dense[written], copied)


def _find_plan(
    stored: Sequence[Tensor],
    beside: Sequence[Tensor],
    values: Sequence[Tensor],
    vector: int,
    seeds: Sequence[int],
    firsts: Sequence[int],
) -> LaunchPlan:
    """Values count as gradients: beside weights they are the states, beside states the weights."""
    if stored[0].dtype in (torch.int8, torch.uint8):
        lists, kept = [values, values, stored], Kept((), [beside], seeds, firsts)
    else:
        lists, kept = [stored, values, values], Kept(beside, (), seeds, firsts)
    return find_plan(lists, block=CHUNK, vector=vector, kept=kept)


def _constants(stream: int | None, vector: int, launch: Launch) -> dict[str, Any]:
    """The kernel's last parameters, and options."""
    dtypes = launch.dtypes
    is_state = dtypes.first_state in (tl.int8, tl.uint8)
    return {
        "STREAM": stream,
        "STORED": dtypes.first_state if is_state else dtypes.param,
        "RESIDUAL": dtypes.residual,
        "VALUE": dtypes.grad,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "VECTOR": vector,
        "num_warps": CHUNK // (32 * vector),
        "enable_fp_fusion": True,
    }
