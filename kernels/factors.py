"""Symmetric products in Triton: the factor momenta and K K^T, half their tiles computed.

For a factor K of size d on one axis of a gradient, M = C^T G K with this axis as its rows, e the
size of the other axis and t = ||other factor||_F^2 / e (reference/matrix.py is the specification):

    factor momenta   H  = 1/2 (B / e M M^T + damping t K^T K - I)
                     m <- factor_momentum m + (1 - factor_momentum) H
    products         P  = K K^T

Shapes: K, m, P (d, d); M (d, e), or (e, d) read as its transpose; a diagonal factor has K, m (d,)
and needs the row sums of squares of M alone. Dtypes: GEMM operands, m and P bfloat16 or float32,
accumulated in float32 and rounded once, at the write; a diagonal factor float32. FLOPs: half of
2 d^2 (d + e) and of 2 d^3.

A program computes one tile on or below the diagonal and stores it twice, the second time
transposed. Norms leave as one partial sum a tile, for `tiles.sum_of`.
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

# Limit of the specification: a norm of m stays finite.
_LARGEST = tl.constexpr(2.0**48)


@triton.jit
def decayed(average, value, decay, one_minus_decay):
    # As torch.lerp does it: one formula for all decays would be inexact near 0 or drift near 1.
    change = value - average
    return tl.where(decay > 0.5, average + one_minus_decay * change, value - decay * change)


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
def _store_symmetric(ptr, d, stride, value, part, is_diagonal):
    """Store a part of a tile and its mirror image; a diagonal tile is its own."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    value = value.to(ptr.dtype.element_ty)
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, ROWS, COLUMNS)
    tl.store(ptrs, value, mask=mask)
    if not is_diagonal:
        mirrored, within = tile_of(ptr, stride, (d, stride), (part[1], part[0]), COLUMNS, ROWS)
        tl.store(mirrored, tl.trans(value), mask=within)


@triton.jit
def store_symmetric_tile(ptr, d, value, tile):
    """Where rows are aligned."""
    parts = quarters(value)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        _store_symmetric(ptr, d, padded(d), parts[i], part, tile[0] == tile[1])


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
    _store_symmetric(ptr, d, stride, rounded, part, is_diagonal)
    if copy_ptr is not None:
        _store_symmetric(copy_ptr, d, padded(d), rounded, part, is_diagonal)
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
def _products_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + 2)
    factor = (pointer_at(job_ptr, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(factor, factor, acc, (d, d, d), tile, False, True, BLOCK_K, PRECISION)
    product_ptr = pointer_at(job_ptr + 1, scratch_ptr, FACTOR)
    if tl.load(job_ptr + 4) == 0:  # rows are aligned
        store_symmetric_tile(product_ptr, d, acc, tile)
    else:
        is_diagonal = tile[0] == tile[1]
        park_ptr = pointer_at(job_ptr + 4, scratch_ptr, tl.float32)
        copy_ptr = pointer_at(job_ptr + 3, scratch_ptr, FACTOR)
        park(acc, park_ptr, (d, d), tile)
        for i in range(BLOCK // PARKED_ROWS):
            part = (tile[0] * (BLOCK // PARKED_ROWS) + i, tile[1])
            product = parked(park_ptr, (d, d), part, PARKED_ROWS, BLOCK)
            _store_symmetric(product_ptr, d, d, product, part, is_diagonal)
            _store_symmetric(copy_ptr, d, padded(d), product, part, is_diagonal)
