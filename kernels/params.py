"""The last launch of IF-Shampoo, in Triton: P and the descent of the parameters.

    P = V (K K^T), where one factor is diagonal (C C^T) G or G (K K^T), times its squares on the
        other side; its entries within +-bound
    u = sign P + coupled p
    p <- p - lr decoupled p
    buf <- momentum buf + u                                 (buf = u where there are no buffers)
    p <- p - lr buf

Shapes and dtypes are those of kernels/matrix.py: GEMM operands bfloat16 or float32, all else in
float32 registers, the parameter rounded once, at the write. FLOPs: 2 m n k. Bytes an element of
float32 parameters: 16 (p and buf read and written), 8 without buffers, and the operands. A program
works on one tile of one job: a row of `slots.Params`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import descend, skips
from .slots import IFSHAMPOO, LAYOUT, MEMBER, PARAMS
from .tiles import (
    find_tile,
    padded,
    pointer_at,
    product_tile,
    quarters,
    ragged_pointer_at,
    scales,
    size_at,
    spill,
    spilled,
    tile_of,
)


@triton.jit
def _param_update(p, update, buf, lr, scalars_ptr):
    decoupled = tl.load(scalars_ptr + IFSHAMPOO.decoupled)
    coupled = tl.load(scalars_ptr + IFSHAMPOO.coupled)
    u = tl.load(scalars_ptr + IFSHAMPOO.sign) * update
    return descend(p, u, buf, lr, coupled, decoupled, scalars_ptr + IFSHAMPOO.momentum)


@triton.jit
def _update_param_part(
    job_ptr, scratch_ptr, members_ptr, size, update, lr, scalars_ptr, part,
    PARAM: tl.constexpr, HAS_BUF: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = update.shape[0]
    COLUMNS: tl.constexpr = update.shape[1]
    m, n = size
    if tl.load(job_ptr + PARAMS.row_scales) != 0:
        rows_ptr = ragged_pointer_at(job_ptr + PARAMS.row_scales, scratch_ptr, tl.float32)
        rows = scales(rows_ptr, m, part[0], ROWS)
        update *= (rows * rows)[:, None]
    if tl.load(job_ptr + PARAMS.column_scales) != 0:
        columns_ptr = ragged_pointer_at(job_ptr + PARAMS.column_scales, scratch_ptr, tl.float32)
        columns = scales(columns_ptr, n, part[1], COLUMNS)
        update *= (columns * columns)[None, :]
    # Before p and buf are loaded: with them in registers it would spill.
    bound = tl.load(scalars_ptr + IFSHAMPOO.bound)
    update = tl.clamp(update, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    # Addresses too are loaded here, by every part.
    member_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + PARAMS.member)
    ROW_MULTIPLE: tl.constexpr = LAYOUT.row_multiple
    first = tl.multiple_of(tl.load(job_ptr + PARAMS.first), ROW_MULTIPLE)
    param_ptr = pointer_at(member_ptr + MEMBER.param, scratch_ptr, PARAM) + first
    stride = size_at(job_ptr + PARAMS.columns)
    if EVEN:
        stride = padded(stride)
    ptrs, mask = tile_of(param_ptr, stride, size, part, ROWS, COLUMNS)
    p = tl.load(ptrs, mask=mask).to(tl.float32)
    buf = None
    if HAS_BUF:
        buf_ptr = pointer_at(member_ptr + MEMBER.buffer, scratch_ptr, tl.float32) + first
        buf_ptrs, _ = tile_of(buf_ptr, stride, size, part, ROWS, COLUMNS)
        buf = tl.load(buf_ptrs, mask=mask)
    p, u = _param_update(p, update, buf, lr, scalars_ptr)
    if HAS_BUF:
        tl.store(buf_ptrs, u, mask=mask)
    tl.store(ptrs, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["lr_ptr", "found_inf_ptr"])
def _params_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    lr_ptr,
    found_inf_ptr,
    PARAM: tl.constexpr,
    HAS_BUF: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    size = (
        size_at(job_ptr + PARAMS.m),
        size_at(job_ptr + PARAMS.n),
        size_at(job_ptr + PARAMS.k),
    )
    m, n, k = size
    a_ptr = pointer_at(job_ptr + PARAMS.a, scratch_ptr, FACTOR)
    b_ptr = pointer_at(job_ptr + PARAMS.b, scratch_ptr, FACTOR)
    a = (a_ptr, size_at(job_ptr + PARAMS.a_columns))
    b = (b_ptr, size_at(job_ptr + PARAMS.b_columns))
    update = tl.zeros([BLOCK, BLOCK], tl.float32)
    update = product_tile(a, b, update, size, tile, False, False, BLOCK_K, PRECISION)
    lr = tl.load(lr_ptr).to(tl.float32)
    even = (m, padded(n))
    if tl.load(job_ptr + PARAMS.spill) == 0:  # rows are aligned
        parts = quarters(update)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            _update_param_part(
                job_ptr, scratch_ptr, members_ptr, even, parts[i], lr, scalars_ptr, part,
                PARAM, HAS_BUF, True,
            )  # fmt: skip
    else:
        spill_ptr = pointer_at(job_ptr + PARAMS.spill, scratch_ptr, tl.float32)
        if k > 0:  # else G lies there
            spill(update, spill_ptr, (m, n), tile)
        for i in range(BLOCK // LAYOUT.spilled_rows):
            part = (tile[0] * (BLOCK // LAYOUT.spilled_rows) + i, tile[1])
            rows = spilled(spill_ptr, (m, n), part, LAYOUT.spilled_rows, BLOCK)
            if size_at(job_ptr + PARAMS.columns) % LAYOUT.row_multiple == 0:
                _update_param_part(
                    job_ptr, scratch_ptr, members_ptr, even, rows, lr, scalars_ptr, part,
                    PARAM, HAS_BUF, True,
                )  # fmt: skip
            else:
                _update_param_part(
                    job_ptr, scratch_ptr, members_ptr, (m, n), rows, lr, scalars_ptr, part,
                    PARAM, HAS_BUF, False,
                )  # fmt: skip
