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
`tiles.sum_of`. A program works on one tile of one job: a row of `slots.Momenta` or `slots.Factors`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .slots import FACTORS, IFSHAMPOO, LAYOUT, MOMENTA, SIDE, STRUCTURE
from .tiles import (
    find_tile,
    padded,
    pointer_at,
    product_tile,
    quarters,
    ragged_pointer_at,
    size_at,
    spill,
    spilled,
    store_symmetric,
    sum_of,
    tile_of,
)

# Limit of the specification: a norm of m stays finite.
_LARGEST = tl.constexpr(2.0**48)


@triton.jit
def sum_rows(ptr, d, count, pid, BLOCK: tl.constexpr):
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
    decay = tl.load(scalars_ptr + IFSHAMPOO.factor_momentum)
    m = decayed(m, h, decay, tl.load(scalars_ptr + IFSHAMPOO.one_minus_factor_momentum))
    return tl.clamp(m, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _update_momentum_part(
    ptr, d, lives, stride, copy_ptr, gram, c1, scalars_ptr, part, is_diagonal
):
    """Returns the part's sums of squares by rows."""
    ROWS: tl.constexpr = gram.shape[0]
    COLUMNS: tl.constexpr = gram.shape[1]
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, ROWS, COLUMNS)
    m = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    offs_m = part[0] * ROWS + tl.arange(0, ROWS)
    offs_n = part[1] * COLUMNS + tl.arange(0, COLUMNS)
    identity = (offs_m[:, None] == offs_n[None, :]) & (offs_m[:, None] < lives)
    m = _momentum_update(m, gram, c1, identity.to(tl.float32), scalars_ptr)
    rounded = m.to(ptr.dtype.element_ty)
    store_symmetric(ptr, d, stride, rounded, part, is_diagonal)
    if copy_ptr is not None:
        store_symmetric(copy_ptr, d, padded(d), rounded, part, is_diagonal)
    m = rounded.to(tl.float32)
    return tl.sum(m * m, 1)


@triton.jit
def _update_momentum_tile(
    job_ptr, scratch_ptr, d, gram, c1, scalars_ptr, tile, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns what the tile and its mirror image add to ||m||^2."""
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    is_diagonal = tile[0] == tile[1]
    lives = size_at(job_ptr + MOMENTA.lives)
    if tl.load(job_ptr + MOMENTA.spill) == 0:  # rows are aligned
        momentum_ptr = pointer_at(job_ptr + MOMENTA.momentum, scratch_ptr, FACTOR)
        parts = quarters(gram)
        squares = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            squares += _update_momentum_part(
                momentum_ptr, d, lives, padded(d), None, parts[i], c1, scalars_ptr, part,
                is_diagonal,
            )  # fmt: skip
        norm = tl.sum(squares, 0)
    else:
        ragged_ptr = ragged_pointer_at(job_ptr + MOMENTA.momentum, scratch_ptr, FACTOR)
        spill_ptr = pointer_at(job_ptr + MOMENTA.spill, scratch_ptr, tl.float32)
        copy_ptr = pointer_at(job_ptr + MOMENTA.copy, scratch_ptr, FACTOR)
        spill(gram, spill_ptr, (d, d), tile)
        rows = tl.zeros([ROWS], tl.float32)
        for i in range(BLOCK // ROWS):
            part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
            gram_part = spilled(spill_ptr, (d, d), part, ROWS, BLOCK)
            rows += _update_momentum_part(
                ragged_ptr, d, lives, d, copy_ptr, gram_part, c1, scalars_ptr, part, is_diagonal
            )
        norm = tl.sum(rows, 0)
    return norm * tl.where(is_diagonal, 1.0, 2.0)


@triton.jit
def _update_diagonal_momentum(job_ptr, scratch_ptr, d, ratio, c1, scalars_ptr, pid, BLOCK):
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < d
    squares_ptr = pointer_at(job_ptr + MOMENTA.transformed, scratch_ptr, tl.float32)
    gram = sum_rows(squares_ptr, d, size_at(job_ptr + MOMENTA.columns), pid, BLOCK)
    k_ptrs = ragged_pointer_at(job_ptr + MOMENTA.factor, scratch_ptr, tl.float32) + offs
    m_ptrs = ragged_pointer_at(job_ptr + MOMENTA.momentum, scratch_ptr, tl.float32) + offs
    k = tl.load(k_ptrs, mask=mask, other=0.0)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    m = _momentum_update(m, gram + ratio * k * k, c1, 1.0, scalars_ptr)
    tl.debug_barrier()  # several threads may hold an entry: each has read it before one writes
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
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + MOMENTA.size)
    e = size_at(job_ptr + MOMENTA.others)
    trace_ptr = ragged_pointer_at(job_ptr + MOMENTA.trace, scratch_ptr, tl.float32)
    trace_count = size_at(job_ptr + MOMENTA.trace_count)
    trace = sum_of(trace_ptr, trace_count, tl.load(job_ptr + MOMENTA.trace_squares) != 0, BLOCK) / e
    c1 = tl.load(scalars_ptr + IFSHAMPOO.batch_size) / e
    ratio = tl.load(scalars_ptr + IFSHAMPOO.damping) * trace / c1
    norm_ptr = ragged_pointer_at(job_ptr + MOMENTA.norms, scratch_ptr, tl.float32) + index
    # A gradient that is exactly zero leaves m alone, and its factor takes a step of 0.
    nonzeros_ptr = pointer_at(job_ptr + MOMENTA.nonzeros, scratch_ptr, tl.float32)
    if sum_of(nonzeros_ptr, size_at(job_ptr + MOMENTA.nonzeros_count), False, BLOCK) == 0:
        return
    side = tl.load(job_ptr + MOMENTA.side)

    if side == SIDE.diagonal:
        norm = _update_diagonal_momentum(
            job_ptr, scratch_ptr, d, ratio, c1, scalars_ptr, tile[0], BLOCK
        )
        tl.store(norm_ptr, norm)
    else:
        factor = (pointer_at(job_ptr + MOMENTA.factor, scratch_ptr, FACTOR), d)
        m_ptr = pointer_at(job_ptr + MOMENTA.transformed, scratch_ptr, FACTOR)
        m = (m_ptr, size_at(job_ptr + MOMENTA.columns))
        size = (d, d, e)
        gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        gram = product_tile(factor, factor, gram, (d, d, d), tile, True, False, BLOCK_K, PRECISION)
        gram *= ratio
        if side == SIDE.rows:
            gram = product_tile(m, m, gram, size, tile, False, True, BLOCK_K, PRECISION)
        else:
            gram = product_tile(m, m, gram, size, tile, True, False, BLOCK_K, PRECISION)
        norm = _update_momentum_tile(
            job_ptr, scratch_ptr, d, gram, c1, scalars_ptr, tile, FACTOR, BLOCK
        )
        tl.store(norm_ptr, norm)


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
def update_ragged_factor_tile(
    factor_ptr, residual_ptr, d, copy_ptr, spill_ptr, product, step, tile, BLOCK: tl.constexpr
):
    """Where they are not; the copy has padded rows."""
    spill(product, spill_ptr, (d, d), tile)
    for i in range(BLOCK // LAYOUT.spilled_rows):
        part = (tile[0] * (BLOCK // LAYOUT.spilled_rows) + i, tile[1])
        rows = spilled(spill_ptr, (d, d), part, LAYOUT.spilled_rows, BLOCK)
        _update_factor_part(factor_ptr, factor_ptr, residual_ptr, d, d, copy_ptr, rows, step, part)


@triton.jit
def _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK: tl.constexpr):
    """factor_lr / max(1, ||m||_F), or 0 where the gradient was exactly zero."""
    norms_ptr = ragged_pointer_at(job_ptr + FACTORS.norms, scratch_ptr, tl.float32)
    norm = tl.sqrt(sum_of(norms_ptr, size_at(job_ptr + FACTORS.norms_count), False, BLOCK))
    factor_lr = tl.load(scalars_ptr + IFSHAMPOO.factor_lr)
    step = factor_lr / tl.maximum(norm, 1.0, propagate_nan=tl.PropagateNan.ALL)
    nonzeros_ptr = pointer_at(job_ptr + FACTORS.nonzeros, scratch_ptr, tl.float32)
    nonzeros = sum_of(nonzeros_ptr, size_at(job_ptr + FACTORS.nonzeros_count), False, BLOCK)
    return tl.where(nonzeros > 0, step, 0.0)


@triton.jit
def finish_factor(
    job_ptr, scratch_ptr, product, tile, _, scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A tile of K after the step, from one of K m of a stack, whose rows are aligned."""
    step = _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
    old_ptr = pointer_at(job_ptr + FACTORS.old, scratch_ptr, FACTOR)
    factor_ptr = pointer_at(job_ptr + FACTORS.factor, scratch_ptr, FACTOR)
    residual_ptr = pointer_at(job_ptr + FACTORS.residual, scratch_ptr, tl.int16)
    d = size_at(job_ptr + FACTORS.size)
    update_factor_tile(old_ptr, factor_ptr, residual_ptr, d, product, step, tile)


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
    d = size_at(job_ptr + FACTORS.size)
    step = _factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
    structure = tl.load(job_ptr + FACTORS.structure)

    if structure == STRUCTURE.diagonal:
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        ptrs = ragged_pointer_at(job_ptr + FACTORS.factor, scratch_ptr, tl.float32) + offs
        diagonal = tl.load(ptrs, mask=offs < d)
        m_ptr = ragged_pointer_at(job_ptr + FACTORS.operand, scratch_ptr, tl.float32)
        m = tl.load(m_ptr + offs, mask=offs < d)
        tl.debug_barrier()  # as for momenta
        tl.store(ptrs, _factor_update(diagonal, diagonal * m, step), mask=offs < d)
    else:
        factor = (pointer_at(job_ptr + FACTORS.old, scratch_ptr, FACTOR), d)
        momentum = (pointer_at(job_ptr + FACTORS.operand, scratch_ptr, FACTOR), d)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = product_tile(factor, momentum, acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION)
        if structure == STRUCTURE.aligned:
            factor_ptr = pointer_at(job_ptr + FACTORS.factor, scratch_ptr, FACTOR)
            residual_ptr = pointer_at(job_ptr + FACTORS.residual, scratch_ptr, tl.int16)
            update_factor_tile(factor_ptr, factor_ptr, residual_ptr, d, acc, step, tile)
        else:
            ragged_ptr = ragged_pointer_at(job_ptr + FACTORS.factor, scratch_ptr, FACTOR)
            low_ptr = ragged_pointer_at(job_ptr + FACTORS.residual, scratch_ptr, tl.int16)
            spill_ptr = pointer_at(job_ptr + FACTORS.spill, scratch_ptr, tl.float32)
            copy_ptr = pointer_at(job_ptr + FACTORS.copy, scratch_ptr, FACTOR)
            update_ragged_factor_tile(
                ragged_ptr, low_ptr, d, copy_ptr, spill_ptr, acc, step, tile, BLOCK
            )
