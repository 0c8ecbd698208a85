"""The last launch of IF-Shampoo, in Triton: P and the descent of the parameters.

Equations, shapes and dtypes are those of kernels/matrix.py. A program works on one tile of one
matrix, found through a job table (kernels/matrix_jobs.py); a job has in its columns

    A, its columns, B, its columns, member, -, m, n, k, row scales, column scales, where tiles are
    parked

where a k of 0 means that both factors are diagonal: G lies where tiles are parked. FLOPs: 2 m n k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import skips
from .tiles import (
    PARKED_ROWS,
    find_tile,
    padded,
    park,
    parked,
    pointer_at,
    product_of,
    quarters,
    scales,
    size_at,
    tile_of,
)


@triton.jit
def _param_update(p, update, buf, lr, scalars_ptr):
    decoupled = tl.load(scalars_ptr + 7)
    coupled = tl.load(scalars_ptr + 8)
    u = tl.load(scalars_ptr + 6) * update + coupled * p
    p -= lr * decoupled * p
    if buf is not None:
        u += tl.load(scalars_ptr + 9) * buf
    return p - lr * u, u


@triton.jit
def _update_param_part(
    job_ptr, scratch_ptr, param_ptr, buf_ptr, size, update, lr, scalars_ptr, part
):
    ROWS: tl.constexpr = update.shape[0]
    COLUMNS: tl.constexpr = update.shape[1]
    m, n = size
    if tl.load(job_ptr + 9) != 0:
        rows = scales(pointer_at(job_ptr + 9, scratch_ptr, tl.float32), m, part[0], ROWS)
        update *= (rows * rows)[:, None]
    if tl.load(job_ptr + 10) != 0:
        columns_ptr = pointer_at(job_ptr + 10, scratch_ptr, tl.float32)
        columns = scales(columns_ptr, n, part[1], COLUMNS)
        update *= (columns * columns)[None, :]
    # Before p and buf are loaded: with them in registers it would spill.
    bound = tl.load(scalars_ptr + 10)
    update = tl.clamp(update, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    ptrs, mask = tile_of(param_ptr, n, size, part, ROWS, COLUMNS)
    p = tl.load(ptrs, mask=mask).to(tl.float32)
    buf = None
    if buf_ptr is not None:
        buf_ptrs, _ = tile_of(buf_ptr, n, size, part, ROWS, COLUMNS)
        buf = tl.load(buf_ptrs, mask=mask)
    p, u = _param_update(p, update, buf, lr, scalars_ptr)
    if buf_ptr is not None:
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
    size = (size_at(job_ptr + 6), size_at(job_ptr + 7), size_at(job_ptr + 8))
    m, n, k = size
    update = product_of(job_ptr, scratch_ptr, size, tile, False, FACTOR, BLOCK, BLOCK_K, PRECISION)
    lr = tl.load(lr_ptr).to(tl.float32)
    member_ptr = members_ptr + 4 * tl.load(job_ptr + 4)
    param_ptr = pointer_at(member_ptr, scratch_ptr, PARAM)
    buf_ptr = None
    if HAS_BUF:
        buf_ptr = pointer_at(member_ptr + 2, scratch_ptr, tl.float32)
    even = (m, padded(n))
    if tl.load(job_ptr + 11) == 0:  # rows are aligned
        parts = quarters(update)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            _update_param_part(
                job_ptr, scratch_ptr, param_ptr, buf_ptr, even, parts[i], lr, scalars_ptr, part
            )
    else:
        park_ptr = pointer_at(job_ptr + 11, scratch_ptr, tl.float32)
        if k > 0:  # else both factors are diagonal, and G lies there
            park(update, park_ptr, (m, n), tile)
        for i in range(BLOCK // PARKED_ROWS):
            part = (tile[0] * (BLOCK // PARKED_ROWS) + i, tile[1])
            rows = parked(park_ptr, (m, n), part, PARKED_ROWS, BLOCK)
            if n % 8 == 0:
                _update_param_part(
                    job_ptr, scratch_ptr, param_ptr, buf_ptr, even, rows, lr, scalars_ptr, part
                )
            else:
                _update_param_part(
                    job_ptr, scratch_ptr, param_ptr, buf_ptr, (m, n), rows, lr, scalars_ptr, part
                )
