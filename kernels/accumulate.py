"""Gradients of micro-batches added up, with their squares or signs: one launch for all tensors.

    sum  <- sum + w g
    part <- part + (w g)^2, or part + w sign(g), or no part       (both start at 0 with the first)

reference.accumulate_ is the specification. Shapes: lists of tensors, entry by entry of one shape.
Dtypes: grads float32, bfloat16 or float16, never written; sums and parts float32. Bytes an element
of float32: 12 (g and sum read, sum written), 20 with parts; with the first, which reads no sum, 8
and 12; in bfloat16 2 less.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import sign_of
from .diag import BLOCK, NUM_WARPS, VECTOR, call_launches
from .slots import ROW
from .tables import (
    Launch,
    LaunchPlan,
    contiguous_copies,
    copy_back,
    find_plan,
    scalar_table,
)

# BLOCK, NUM_WARPS and VECTOR are those of diag.py. The SASS for sm_80, sm_90 and sm_100 has 4 loads
# of 16 bytes in flight a thread, with parts 6 (those of 16-bit gradients are of 8), at 24 to 40
# registers: 12 or 16 programs, 96 to 144 KB on a multiprocessor. Times on a GPU are not measured.


@triton.jit
def _accumulate_chunk(
    sum_ptr,
    parts_ptr,
    grad_ptr,
    mask,
    weight,
    SIGNS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    if not FIRST:
        total = tl.load(sum_ptr + offs, mask=mask)
        if parts_ptr is not None:
            parts = tl.load(parts_ptr + offs, mask=mask)
        # As in diag.py: all loads before the arithmetic.
        tl.debug_barrier()
    g *= weight
    part = weight * sign_of(g) if SIGNS else g * g
    if not FIRST:
        g += total
        if parts_ptr is not None:
            part += parts
    tl.store(sum_ptr + offs, g, mask=mask)
    if parts_ptr is not None:
        tl.store(parts_ptr + offs, part, mask=mask)


@triton.jit
def _accumulate_kernel(
    chunks_ptr,
    rows_ptr,
    scalars_ptr,
    GRAD: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    SIGNS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    pid = tl.program_id(0)
    row_ptr = rows_ptr + len(ROW) * tl.load(chunks_ptr + pid)
    start = (pid - tl.load(row_ptr + ROW.first_program)) * BLOCK
    sum_ptr = tl.load(row_ptr + ROW.param).to(tl.pointer_type(tl.float32)) + start
    grad_ptr = tl.load(row_ptr + ROW.grad).to(tl.pointer_type(GRAD)) + start
    parts_ptr = None
    if HAS_PARTS:
        parts_ptr = tl.load(row_ptr + ROW.parts).to(tl.pointer_type(tl.float32)) + start
    weight = tl.load(scalars_ptr)

    # As in diag.py: only aligned full chunks may promise alignment.
    if start < tl.load(row_ptr + ROW.aligned):
        sum_ptr = tl.multiple_of(sum_ptr, VECTOR * 4)
        grad_ptr = tl.multiple_of(grad_ptr, VECTOR * GRAD.primitive_bitwidth // 8)
        if HAS_PARTS:
            parts_ptr = tl.multiple_of(parts_ptr, VECTOR * 4)
        _accumulate_chunk(sum_ptr, parts_ptr, grad_ptr, None, weight, SIGNS, FIRST, BLOCK)
    else:
        mask = tl.arange(0, BLOCK) < tl.load(row_ptr + ROW.length) - start
        _accumulate_chunk(sum_ptr, parts_ptr, grad_ptr, mask, weight, SIGNS, FIRST, BLOCK)


@torch.no_grad()
def accumulate_(
    sums: Sequence[Tensor],
    parts: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    weight: float,
    signs: bool,
    first: bool,
) -> None:
    """The operator of this name. Tensors that do not lie alike go through copies."""
    if not sums:
        return

    def pointers(device: torch.device) -> tuple[Tensor | None, ...]:
        return (scalar_table(device, (weight,)).on_device(),)

    plan, dense = _find_plan(sums, grads, parts), [sums, grads, parts]
    copied = plan.copied
    if copied:
        dense = contiguous_copies(dense, copied)
        plan = _find_plan(*dense)
    kind = signs, first
    call_launches(_accumulate_kernel, plan, pointers, partial(_constants, kind), kind)
    copy_back([sums, parts], [dense[0], dense[2]], copied)


def _find_plan(
    sums: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Tensor]
) -> LaunchPlan:
    return find_plan([sums, grads], block=BLOCK, vector=VECTOR, parts=parts)


def _constants(kind: tuple[bool, bool], launch: Launch) -> dict[str, Any]:
    """The kernel's last parameters, and options."""
    return {
        "GRAD": launch.dtypes.grad,
        "HAS_PARTS": launch.dtypes.parts is not None,
        "SIGNS": kind[0],
        "FIRST": kind[1],
        "BLOCK": BLOCK,
        "VECTOR": VECTOR,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }
