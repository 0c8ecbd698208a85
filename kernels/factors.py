"""The factor update of IF-Shampoo, in Triton: factor momenta, then factors.

For a factor K of size d on one axis of a gradient, M = C^T G K with this axis as its rows, e the
size of the other axis and t = ||other factor||_F^2 / e (reference/matrix.py is the specification):

    momenta    H = 1/2 (B / e M M^T + damping t K^T K - I)
               m <- factor_momentum m + (1 - factor_momentum) H
    factors    K <- K - factor_lr / max(1, ||m||_F) K m

Shapes: K, m (d, d); M (d, e), or (e, d) read as its transpose; a diagonal factor has K, m (d,) and
needs the row sums of squares of M alone. Dtypes: GEMM operands and m bfloat16 or float32,
accumulated in float32 and rounded once, at the write; a diagonal factor float32. FLOPs: half of
2 d^2 (d + e) for m, of which a program computes one tile on or below the diagonal and stores it
twice, the second time transposed; 2 d^3 for K. Norms leave as one partial sum a tile, for
`tiles.sum_of`.

A job has, by launch, in its columns

    factors    K, m, d, factor, residual, copy, partial ||m||^2, their count, kind, parking,
               partial counts of G's elements other than 0, their count

`_stacked_factors_kernel` is for stacks of aligned matrices, on Hopper: the same jobs, the same
epilogue and the same bits; what differs is how operands are read and tiles dealt out. The factors
and momenta of a bucket are stacks, so one tensor descriptor a stack, made on the host, serves all
members: the tensor memory accelerator reads whole tiles, and zeros beyond the edge of each matrix.
As many programs as a GPU holds share the tiles of a launch, so that the products of one hide the
epilogue of another. A job's last column is the matrix's place in its stacks; `old` has copies of
the factors, which the launch overwrites.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .tiles import (
    MATRIX,
    PARKED_ROWS,
    find_tile,
    padded,
    park,
    parked,
    pointer_at,
    product_tile,
    quarters,
    size_at,
    stacked_product_tile,
    store_symmetric,
    sum_of,
    tile_at,
    tile_of,
)

# Limit of the specification: a norm of m stays finite.
_LARGEST = tl.constexpr(2.0**48)


@triton.jit
def _sum_rows(ptr, d, count, pid, BLOCK: tl.constexpr):
    """The sum over `count` rows of d numbers, a block of columns of it, in one fixed order."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    offs_row = tl.arange(0, 16)
    total = tl.zeros([16, BLOCK], tl.float32)
    for done in range(0, count, 16):
        ptrs = ptr + (done + offs_row[:, None]).to(tl.int64) * d + offs[None, :]
        mask = (offs_row[:, None] < count - done) & (offs[None, :] < d)
        total += tl.load(ptrs, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _momentum_update(m, gram, c1, identity, scalars_ptr):
    """`gram` is M M^T + (c2 / c1) K^T K."""
    h = 0.5 * (c1 * gram - identity)
    m = decayed(m, h, tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4))
    return tl.clamp(m, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _update_momentum_part(ptr, d, stride, copy_ptr, gram, c1, scalars_ptr, part, is_diagonal):
    """Returns the part's sums of squares by rows."""
    ROWS: tl.constexpr = gram.shape[0]
    COLUMNS: tl.constexpr = gram.shape[1]
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, ROWS, COLUMNS)
    m = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    offs_m = part[0] * ROWS + tl.arange(0, ROWS)
    offs_n = part[1] * COLUMNS + tl.arange(0, COLUMNS)
    identity = (offs_m[:, None] == offs_n[None, :]) & (offs_m[:, None] < d)
    m = _momentum_update(m, gram, c1, identity.to(tl.float32), scalars_ptr)
    rounded = m.to(ptr.dtype.element_ty)
    store_symmetric(ptr, d, stride, rounded, part, is_diagonal)
    if copy_ptr is not None:
        store_symmetric(copy_ptr, d, padded(d), rounded, part, is_diagonal)
    m = rounded.to(tl.float32)
    return tl.sum(m * m, 1)


@triton.jit
def _update_diagonal_momentum(job_ptr, scratch_ptr, d, ratio, c1, scalars_ptr, pid, BLOCK):
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < d
    squares_ptr = pointer_at(job_ptr + 1, scratch_ptr, tl.float32)
    gram = _sum_rows(squares_ptr, d, size_at(job_ptr + 4), pid, BLOCK)
    k_ptrs = pointer_at(job_ptr, scratch_ptr, tl.float32) + offs
    m_ptrs = pointer_at(job_ptr + 6, scratch_ptr, tl.float32) + offs
    k = tl.load(k_ptrs, mask=mask, other=0.0)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    m = _momentum_update(m, gram + ratio * k * k, c1, 1.0, scalars_ptr)
    tl.store(m_ptrs, m, mask=mask)
    return tl.sum(tl.where(mask, m * m, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _factor_momenta_kernel(
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
    job_ptr, tile, place = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + 2)
    e = size_at(job_ptr + 3)
    trace_ptr = pointer_at(job_ptr + 8, scratch_ptr, tl.float32)
    trace = sum_of(trace_ptr, size_at(job_ptr + 9), tl.load(job_ptr + 10) != 0, BLOCK) / e
    c1 = tl.load(scalars_ptr + 1) / e
    ratio = tl.load(scalars_ptr + 2) * trace / c1
    norm_ptr = pointer_at(job_ptr + 11, scratch_ptr, tl.float32) + place
    # A gradient that is exactly zero leaves m alone, and its factor takes a step of 0.
    told_ptr = pointer_at(job_ptr + 13, scratch_ptr, tl.float32)
    if sum_of(told_ptr, size_at(job_ptr + 14), False, BLOCK) == 0:
        return
    side = tl.load(job_ptr + 5)

    if side == 2:  # a diagonal factor
        norm = _update_diagonal_momentum(
            job_ptr, scratch_ptr, d, ratio, c1, scalars_ptr, tile[0], BLOCK
        )
        tl.store(norm_ptr, norm)
    else:
        factor = (pointer_at(job_ptr, scratch_ptr, FACTOR), d)
        m = (pointer_at(job_ptr + 1, scratch_ptr, FACTOR), size_at(job_ptr + 4))
        size = (d, d, e)
        gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        gram = product_tile(factor, factor, gram, (d, d, d), tile, True, False, BLOCK_K, PRECISION)
        gram *= ratio
        if side == 0:
            gram = product_tile(m, m, gram, size, tile, False, True, BLOCK_K, PRECISION)
        else:
            gram = product_tile(m, m, gram, size, tile, True, False, BLOCK_K, PRECISION)
        momentum_ptr = pointer_at(job_ptr + 6, scratch_ptr, FACTOR)
        is_diagonal = tile[0] == tile[1]
        if tl.load(job_ptr + 12) == 0:  # rows are aligned
            parts = quarters(gram)
            squares = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(4):
                part = (tile[0], 4 * tile[1] + i)
                squares += _update_momentum_part(
                    momentum_ptr, d, padded(d), None, parts[i], c1, scalars_ptr, part, is_diagonal
                )
            norm = tl.sum(squares, 0)
        else:
            park_ptr = pointer_at(job_ptr + 12, scratch_ptr, tl.float32)
            copy_ptr = pointer_at(job_ptr + 7, scratch_ptr, FACTOR)
            park(gram, park_ptr, (d, d), tile)
            rows = tl.zeros([PARKED_ROWS], tl.float32)
            for i in range(BLOCK // PARKED_ROWS):
                part = (tile[0] * (BLOCK // PARKED_ROWS) + i, tile[1])
                gram_part = parked(park_ptr, (d, d), part, PARKED_ROWS, BLOCK)
                rows += _update_momentum_part(
                    momentum_ptr, d, d, copy_ptr, gram_part, c1, scalars_ptr, part, is_diagonal
                )
            norm = tl.sum(rows, 0)
        tl.store(norm_ptr, norm * tl.where(is_diagonal, 1.0, 2.0))


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
def _update_factor_tile(old_ptr, factor_ptr, residual_ptr, d, product, step, tile):
    """Where rows are aligned; the old bfloat16 half may lie apart from the new one."""
    parts = quarters(product)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        _update_factor_part(
            old_ptr, factor_ptr, residual_ptr, d, padded(d), None, parts[i], step, part
        )


@triton.jit
def _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK: tl.constexpr):
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
    step = _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
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
            _update_factor_tile(factor_ptr, factor_ptr, residual_ptr, d, acc, step, tile)
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


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["found_inf_ptr"])
def _stacked_factors_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    count,
    old,
    momenta,
    scalars_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        job_ptr, tile, _ = tile_at(tiles_ptr, jobs_ptr, index)
        matrix = size_at(job_ptr + MATRIX)
        d = size_at(job_ptr + 2)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = stacked_product_tile(old, momenta, acc, d, matrix, tile, False, BLOCK_K)
        step = _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
        old_ptr = pointer_at(job_ptr, scratch_ptr, FACTOR)
        factor_ptr = pointer_at(job_ptr + 3, scratch_ptr, FACTOR)
        residual_ptr = pointer_at(job_ptr + 4, scratch_ptr, tl.int16)
        _update_factor_tile(old_ptr, factor_ptr, residual_ptr, d, acc, step, tile)
