"""The products of IF-Shampoo that are not symmetric, in Triton.

Equations, shapes and dtypes are those of kernels/matrix.py. A program works on one tile of one
matrix, found through a job table (kernels/matrix_jobs.py); a job has, by launch, in its columns

    product, params  A, its columns, B, its columns, output, -, m, n, k, row scales, column scales,
                     row sums of squares | where tiles are parked, column sums of squares
    factors          K, m, d, factor, residual, copy, partial ||m||^2, their count, kind, parking,
                     partial counts of G's elements other than 0, their count

where a product's k of 0 means that both factors are diagonal: A is G, in float32, and the tile is A
scaled. FLOPs: 2 m n k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import skips
from .tiles import (
    PARKED_ROWS,
    find_tile,
    padded,
    park,
    parked,
    pointer_at,
    product_tile,
    quarters,
    size_at,
    sum_of,
    tile_of,
)


@triton.jit
def _scales(ptr, size, pid, BLOCK: tl.constexpr):
    """A block of a diagonal factor; ones for a dense one, whose pointer is null."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(ptr.to(tl.int64) != 0, size, 0)
    return tl.load(ptr + offs, mask=offs < size, other=1.0)


@triton.jit
def _product(job_ptr, scratch_ptr, size, tile, TRANS_A, FACTOR, BLOCK, BLOCK_K, PRECISION):
    a_ptr = pointer_at(job_ptr, scratch_ptr, FACTOR)
    b_ptr = pointer_at(job_ptr + 2, scratch_ptr, FACTOR)
    a, b = (a_ptr, size_at(job_ptr + 1)), (b_ptr, size_at(job_ptr + 3))
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    return product_tile(a, b, acc, size, tile, TRANS_A, False, BLOCK_K, PRECISION)


@triton.jit
def _store_scaled(job_ptr, scratch_ptr, out_ptr, value, size, part):
    """A part of a tile times the diagonal factors; returns its sums of squares by columns."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    m, n = size
    rows = _scales(pointer_at(job_ptr + 9, scratch_ptr, tl.float32), m, part[0], ROWS)
    columns = _scales(pointer_at(job_ptr + 10, scratch_ptr, tl.float32), n, part[1], COLUMNS)
    value *= rows[:, None] * columns[None, :]
    if out_ptr.to(tl.int64) != 0:
        ptrs, mask = tile_of(out_ptr, padded(n), (m, padded(n)), part, ROWS, COLUMNS)
        tl.store(ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.load(job_ptr + 11) != 0:
        offs_m = part[0] * ROWS + tl.arange(0, ROWS)
        sums_ptr = pointer_at(job_ptr + 11, scratch_ptr, tl.float32) + part[1].to(tl.int64) * m
        tl.store(sums_ptr + offs_m, tl.sum(value * value, 1), mask=offs_m < m)
    return tl.sum(value * value, 0)


@triton.jit
def _product_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    TRANS_A: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + 6), size_at(job_ptr + 7), size_at(job_ptr + 8))
    m, n, k = size
    acc = _product(job_ptr, scratch_ptr, size, tile, TRANS_A, FACTOR, BLOCK, BLOCK_K, PRECISION)
    out_ptr = pointer_at(job_ptr + 4, scratch_ptr, FACTOR)
    if (tl.load(job_ptr + 9) | tl.load(job_ptr + 10)) == 0:  # both factors are dense
        ptrs, mask = tile_of(out_ptr, padded(n), (m, padded(n)), tile, BLOCK, BLOCK)
        tl.store(ptrs, acc.to(FACTOR), mask=mask)
    else:
        if k > 0:
            sums = _store_scaled(job_ptr, scratch_ptr, out_ptr, acc, (m, n), tile)
        else:  # both are diagonal: G itself
            source_ptr = pointer_at(job_ptr, scratch_ptr, tl.float32)
            sums = tl.zeros([BLOCK], tl.float32)
            for i in range(BLOCK // PARKED_ROWS):
                part = (tile[0] * (BLOCK // PARKED_ROWS) + i, tile[1])
                rows = parked(source_ptr, (m, n), part, PARKED_ROWS, BLOCK)
                sums += _store_scaled(job_ptr, scratch_ptr, out_ptr, rows, (m, n), part)
        if tl.load(job_ptr + 12) != 0:
            offs_n = tile[1] * BLOCK + tl.arange(0, BLOCK)
            sums_ptr = pointer_at(job_ptr + 12, scratch_ptr, tl.float32) + tile[0].to(tl.int64) * n
            tl.store(sums_ptr + offs_n, sums, mask=offs_n < n)


@triton.jit
def _factor_update(k, product, step):
    # Where the step is 0, the product may be of an m that nobody wrote.
    return tl.where(step == 0, k, k - step * product)


@triton.jit
def _join(high, residual):
    bits = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + residual.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _split(value):
    bits = value.to(tl.int32, bitcast=True)
    # The chip's own NaN is 0x7fffffff, and rounding it would carry into the sign: -0.
    bits = tl.where(value != value, 0x7FC00000, bits)
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def _update_factor_part(
    old_ptr, factor_ptr, residual_ptr, d, stride, copy_ptr, product, step, part
):
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    old_ptrs, _ = tile_of(old_ptr, stride, (d, stride), part, ROWS, COLUMNS)
    ptrs, mask = tile_of(factor_ptr, stride, (d, stride), part, ROWS, COLUMNS)
    k = tl.load(old_ptrs, mask=mask, other=0.0)
    if factor_ptr.dtype.element_ty == tl.float32:
        k = _factor_update(k, product, step)
    else:
        residual_ptrs, _ = tile_of(residual_ptr, stride, (d, stride), part, ROWS, COLUMNS)
        residual = tl.load(residual_ptrs, mask=mask, other=0)
        k, residual = _split(_factor_update(_join(k, residual), product, step))
        tl.store(residual_ptrs, residual, mask=mask)
    tl.store(ptrs, k, mask=mask)
    if copy_ptr is not None:
        ptrs, mask = tile_of(copy_ptr, padded(d), (d, padded(d)), part, ROWS, COLUMNS)
        tl.store(ptrs, k, mask=mask)


@triton.jit
def update_factor_tile(old_ptr, factor_ptr, residual_ptr, d, product, step, tile):
    """Where rows are aligned; the old bfloat16 half may lie apart from the new one."""
    parts = quarters(product)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        _update_factor_part(
            old_ptr, factor_ptr, residual_ptr, d, padded(d), None, parts[i], step, part
        )


@triton.jit
def factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK: tl.constexpr):
    """factor_lr / max(1, ||m||_F), or 0 where the gradient was exactly zero."""
    norm_ptr = pointer_at(job_ptr + 6, scratch_ptr, tl.float32)
    norm = tl.sqrt(sum_of(norm_ptr, size_at(job_ptr + 7), False, BLOCK))
    step = tl.load(scalars_ptr + 5) / tl.maximum(norm, 1.0, propagate_nan=tl.PropagateNan.ALL)
    told_ptr = pointer_at(job_ptr + 10, scratch_ptr, tl.float32)
    return tl.where(sum_of(told_ptr, size_at(job_ptr + 11), False, BLOCK) > 0, step, 0.0)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _factors_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    scalars_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + 2)
    step = factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
    kind = tl.load(job_ptr + 8)

    if kind == 2:  # a diagonal factor
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        ptrs = pointer_at(job_ptr + 3, scratch_ptr, tl.float32) + offs
        diagonal = tl.load(ptrs, mask=offs < d)
        m = tl.load(pointer_at(job_ptr + 1, scratch_ptr, tl.float32) + offs, mask=offs < d)
        tl.store(ptrs, _factor_update(diagonal, diagonal * m, step), mask=offs < d)
    else:
        factor = (pointer_at(job_ptr, scratch_ptr, FACTOR), d)
        momentum = (pointer_at(job_ptr + 1, scratch_ptr, FACTOR), d)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = product_tile(factor, momentum, acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION)
        factor_ptr = pointer_at(job_ptr + 3, scratch_ptr, FACTOR)
        residual_ptr = pointer_at(job_ptr + 4, scratch_ptr, tl.int16)
        if kind == 1:  # rows are aligned
            update_factor_tile(factor_ptr, factor_ptr, residual_ptr, d, acc, step, tile)
        else:
            park_ptr = pointer_at(job_ptr + 9, scratch_ptr, tl.float32)
            copy_ptr = pointer_at(job_ptr + 5, scratch_ptr, FACTOR)
            park(acc, park_ptr, (d, d), tile)
            for i in range(BLOCK // PARKED_ROWS):
                part = (tile[0] * (BLOCK // PARKED_ROWS) + i, tile[1])
                product = parked(park_ptr, (d, d), part, PARKED_ROWS, BLOCK)
                _update_factor_part(
                    factor_ptr, factor_ptr, residual_ptr, d, d, copy_ptr, product, step, part
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
        rows = _scales(pointer_at(job_ptr + 9, scratch_ptr, tl.float32), m, part[0], ROWS)
        update *= (rows * rows)[:, None]
    if tl.load(job_ptr + 10) != 0:
        columns_ptr = pointer_at(job_ptr + 10, scratch_ptr, tl.float32)
        columns = _scales(columns_ptr, n, part[1], COLUMNS)
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
    update = _product(job_ptr, scratch_ptr, size, tile, False, FACTOR, BLOCK, BLOCK_K, PRECISION)
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
