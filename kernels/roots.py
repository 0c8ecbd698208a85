"""The update of S and K of root-free Shampoo, in Triton: six launches, an axis a job.

For an axis of d entries, e those of the other, and `seen` Y (or Z^T) with this axis as its rows:

    grams        S <- S + (1 - beta2) (seen seen^T / e - S)
    damped       T = S K + lam K,   lam = damping mean(diag S)       (K = (s + lam)^(-1/2) itself
                                                                      where the axis is diagonal)
    residuals    E = K^T T - I;   ||E||_F^2
    squares      ||E E||_F^2
    roots        K <- K - b / 2 K E,   b = 1 / max(1, min(||E||_F, sqrt(||E E||_F)))
    inverses     X = K K^T

Shapes: S, K, T, E, X (d, d), a diagonal s and K (d,). Dtypes: GEMM operands, T, E and X bfloat16
or float32, accumulated in float32 and rounded once, at the write: E after the -I. S float32, of
which T reads a copy in the GEMM dtype; K of a bfloat16 axis has a residual (reference.split).
FLOPs: d^2 e for S, 2 d^3 for T and for K, d^3 for E, E E and X, of which a program computes one
tile on or below the diagonal and stores it twice, the second time transposed; of E E nothing is
stored.

The products of `roots` read K, so its new bfloat16 half goes to the scratch, whence `inverses`,
which has every tile of it as an operand, copies it to the state. Where rows are not aligned GEMMs
read copies from the first, and `roots` writes the state. Where G is exactly zero, S and K are left
alone. A program works on one tile of one job: a row of `kernels/rootfree_shampoo_slots.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .factors import sum_rows, update_factor_tile, update_ragged_factor_tile
from .products import store_square
from .rootfree_shampoo_slots import DAMPED, GRAM, ROOT, SHAMPOO, SYMMETRIC
from .slots import LAYOUT, SIDE, SQUARE
from .tiles import (
    find_tile,
    mirror_lower,
    padded,
    pointer_at,
    product_tile,
    quarters,
    size_at,
    spill,
    spilled,
    store_symmetric,
    sum_of,
    tile_of,
)


@triton.jit
def _is_idle(column_ptr, scratch_ptr):
    """Whether a gradient is exactly zero, which leaves S and K alone."""
    return tl.load(pointer_at(column_ptr, scratch_ptr, tl.float32)) == 0


@triton.jit
def _update_gram_part(ptr, d, stride, copy_ptr, seen, scalars_ptr, part, is_diagonal):
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, seen.shape[0], seen.shape[1])
    s = tl.load(ptrs, mask=mask, other=0.0)
    beta2 = tl.load(scalars_ptr + SHAMPOO.beta2)
    s = decayed(s, seen, beta2, tl.load(scalars_ptr + SHAMPOO.one_minus_beta2))
    store_symmetric(ptr, d, stride, s, part, is_diagonal)
    store_symmetric(copy_ptr, d, padded(d), s, part, is_diagonal)


@triton.jit
def _update_gram_tile(
    job_ptr, scratch_ptr, d, seen, scalars_ptr, tile, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    gram_ptr = pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32)
    copy_ptr = pointer_at(job_ptr + GRAM.copy, scratch_ptr, FACTOR)
    is_diagonal = tile[0] == tile[1]
    if tl.load(job_ptr + GRAM.spill) == 0:  # rows are aligned
        parts = quarters(seen)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            _update_gram_part(
                gram_ptr, d, padded(d), copy_ptr, parts[i], scalars_ptr, part, is_diagonal
            )
    else:
        spill_ptr = pointer_at(job_ptr + GRAM.spill, scratch_ptr, tl.float32)
        spill(seen, spill_ptr, (d, d), tile)
        for i in range(BLOCK // ROWS):
            part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
            seen_part = spilled(spill_ptr, (d, d), part, ROWS, BLOCK)
            _update_gram_part(gram_ptr, d, d, copy_ptr, seen_part, scalars_ptr, part, is_diagonal)
    if is_diagonal:  # and its trace
        mirror_lower(gram_ptr, d, d, tile, BLOCK)
        mirror_lower(copy_ptr, d, padded(d), tile, BLOCK)
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        diagonal = tl.load(gram_ptr + offs.to(tl.int64) * (d + 1), mask=offs < d, other=0.0)
        trace_ptr = pointer_at(job_ptr + GRAM.trace, scratch_ptr, tl.float32)
        tl.store(trace_ptr + tile[0], tl.sum(diagonal, 0))


@triton.jit
def _update_diagonal_gram(job_ptr, scratch_ptr, d, e, scalars_ptr, pid, BLOCK: tl.constexpr):
    """Returns the block's sum."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    seen_ptr = pointer_at(job_ptr + GRAM.seen, scratch_ptr, tl.float32)
    seen = sum_rows(seen_ptr, d, size_at(job_ptr + GRAM.columns), pid, BLOCK) / e
    ptrs = pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32) + offs
    s = tl.load(ptrs, mask=offs < d, other=0.0)
    beta2 = tl.load(scalars_ptr + SHAMPOO.beta2)
    s = decayed(s, seen, beta2, tl.load(scalars_ptr + SHAMPOO.one_minus_beta2))
    tl.store(ptrs, s, mask=offs < d)
    return tl.sum(s, 0)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _grams_kernel(
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
    if _is_idle(job_ptr + GRAM.nonzero, scratch_ptr):
        return
    d, e = (size_at(job_ptr + GRAM.size), size_at(job_ptr + GRAM.others))
    side = tl.load(job_ptr + GRAM.side)
    if side == SIDE.diagonal:
        trace = _update_diagonal_gram(job_ptr, scratch_ptr, d, e, scalars_ptr, tile[0], BLOCK)
        trace_ptr = pointer_at(job_ptr + GRAM.trace, scratch_ptr, tl.float32)
        tl.store(trace_ptr + tile[0], trace)
    else:
        seen_ptr = pointer_at(job_ptr + GRAM.seen, scratch_ptr, FACTOR)
        seen = (seen_ptr, size_at(job_ptr + GRAM.columns))
        size = (d, d, e)
        gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        if side == SIDE.rows:
            gram = product_tile(seen, seen, gram, size, tile, False, True, BLOCK_K, PRECISION)
        else:
            gram = product_tile(seen, seen, gram, size, tile, True, False, BLOCK_K, PRECISION)
        gram *= 1.0 / e
        _update_gram_tile(job_ptr, scratch_ptr, d, gram, scalars_ptr, tile, FACTOR, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _damped_kernel(
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
    if _is_idle(job_ptr + DAMPED.nonzero, scratch_ptr):
        return
    d = size_at(job_ptr + DAMPED.size)
    trace_ptr = pointer_at(job_ptr + DAMPED.trace, scratch_ptr, tl.float32)
    trace = sum_of(trace_ptr, size_at(job_ptr + DAMPED.trace_count), False, BLOCK)
    damping = tl.load(scalars_ptr + SHAMPOO.damping) * trace / d
    if tl.load(job_ptr + DAMPED.output) == 0:  # a diagonal axis
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        s_ptr = pointer_at(job_ptr + DAMPED.gram, scratch_ptr, tl.float32)
        s = tl.load(s_ptr + offs, mask=offs < d, other=1.0)
        root_ptr = pointer_at(job_ptr + DAMPED.factor, scratch_ptr, tl.float32)
        tl.store(root_ptr + offs, 1.0 / tl.sqrt(s + damping), mask=offs < d)
    else:
        gram = (pointer_at(job_ptr + DAMPED.gram, scratch_ptr, FACTOR), d)
        factor_ptr = pointer_at(job_ptr + DAMPED.factor, scratch_ptr, FACTOR)
        out_ptr = pointer_at(job_ptr + DAMPED.output, scratch_ptr, FACTOR)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = product_tile(
            gram, (factor_ptr, d), acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION
        )
        parts = quarters(acc)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            even = (d, padded(d))
            ptrs, mask = tile_of(factor_ptr, padded(d), even, part, BLOCK, BLOCK // 4)
            k = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            ptrs, mask = tile_of(out_ptr, padded(d), even, part, BLOCK, BLOCK // 4)
            tl.store(ptrs, (parts[i] + damping * k).to(FACTOR), mask=mask)


@triton.jit
def _store_residual_part(ptr, d, product, part, is_diagonal):
    """E from K^T T; returns its sums of squares by rows, those of the mirror image with them."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    offs_m = part[0] * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = part[1] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    e = product - tl.where((offs_m == offs_n) & (offs_m < d), 1.0, 0.0)
    e = e.to(ptr.dtype.element_ty)
    store_symmetric(ptr, d, padded(d), e, part, is_diagonal)
    e = e.to(tl.float32)
    times = tl.where(offs_m > offs_n, 2.0, tl.where(offs_m == offs_n, 1.0, 0.0))
    return tl.sum(times * e * e, 1)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _residuals_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    if _is_idle(job_ptr + SYMMETRIC.nonzero, scratch_ptr):
        return
    d = size_at(job_ptr + SYMMETRIC.size)
    a = (pointer_at(job_ptr + SYMMETRIC.a, scratch_ptr, FACTOR), d)
    b = (pointer_at(job_ptr + SYMMETRIC.b, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(a, b, acc, (d, d, d), tile, True, False, BLOCK_K, PRECISION)
    out_ptr = pointer_at(job_ptr + SYMMETRIC.output, scratch_ptr, FACTOR)
    parts = quarters(acc)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        sums += _store_residual_part(out_ptr, d, parts[i], part, tile[0] == tile[1])
    if tile[0] == tile[1]:
        mirror_lower(out_ptr, d, padded(d), tile, BLOCK)
    norms_ptr = pointer_at(job_ptr + SYMMETRIC.norms, scratch_ptr, tl.float32)
    tl.store(norms_ptr + index, tl.sum(sums, 0))


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _squares_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    if _is_idle(job_ptr + SYMMETRIC.nonzero, scratch_ptr):
        return
    d = size_at(job_ptr + SYMMETRIC.size)
    a = (pointer_at(job_ptr + SYMMETRIC.a, scratch_ptr, FACTOR), d)
    b = (pointer_at(job_ptr + SYMMETRIC.b, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(a, b, acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION)
    norms_ptr = pointer_at(job_ptr + SYMMETRIC.norms, scratch_ptr, tl.float32)
    norm = tl.sum(tl.sum(acc * acc, 1), 0) * tl.where(tile[0] == tile[1], 1.0, 2.0)
    tl.store(norms_ptr + index, norm)


@triton.jit
def _root_step(job_ptr, scratch_ptr, BLOCK: tl.constexpr):
    """b / 2, or 0 where the gradient was exactly zero."""
    count = size_at(job_ptr + ROOT.norms_count)
    norms_ptr = pointer_at(job_ptr + ROOT.norms, scratch_ptr, tl.float32)
    norm = tl.sqrt(sum_of(norms_ptr, count, False, BLOCK))
    squares_ptr = pointer_at(job_ptr + ROOT.squares, scratch_ptr, tl.float32)
    second = tl.sqrt(tl.sqrt(sum_of(squares_ptr, count, False, BLOCK)))
    # A NaN of the second, whose squares overflow before those of the first, is ignored.
    bound = tl.minimum(norm, second, propagate_nan=tl.PropagateNan.NONE)
    step = 0.5 / tl.maximum(bound, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(_is_idle(job_ptr + ROOT.nonzero, scratch_ptr), 0.0, step)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _roots_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + ROOT.size)
    step = _root_step(job_ptr, scratch_ptr, BLOCK)
    k = (pointer_at(job_ptr + ROOT.operand, scratch_ptr, FACTOR), d)
    e = (pointer_at(job_ptr + ROOT.residual, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(k, e, acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION)
    factor_ptr = pointer_at(job_ptr + ROOT.factor, scratch_ptr, FACTOR)
    target_ptr = pointer_at(job_ptr + ROOT.target, scratch_ptr, FACTOR)
    low_ptr = pointer_at(job_ptr + ROOT.low, scratch_ptr, tl.int16)
    if tl.load(job_ptr + ROOT.spill) == 0:  # rows are aligned
        update_factor_tile(factor_ptr, target_ptr, low_ptr, d, acc, step, tile)
    else:
        spill_ptr = pointer_at(job_ptr + ROOT.spill, scratch_ptr, tl.float32)
        copy_ptr = pointer_at(job_ptr + ROOT.copy, scratch_ptr, FACTOR)
        update_ragged_factor_tile(
            factor_ptr, low_ptr, d, copy_ptr, spill_ptr, acc, step, tile, BLOCK
        )


@triton.jit
def _copy_part(source_ptr, target_ptr, d, part, BLOCK: tl.constexpr):
    source, mask = tile_of(source_ptr, padded(d), (d, padded(d)), part, BLOCK, BLOCK)
    target, _ = tile_of(target_ptr, padded(d), (d, padded(d)), part, BLOCK, BLOCK)
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _inverses_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + SQUARE.size)
    k_ptr = pointer_at(job_ptr + SQUARE.factor, scratch_ptr, FACTOR)
    k = (k_ptr, d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(k, k, acc, (d, d, d), tile, False, True, BLOCK_K, PRECISION)
    store_square(job_ptr, scratch_ptr, d, acc, tile, FACTOR, BLOCK)
    if tile[0] == tile[1]:
        product_ptr = pointer_at(job_ptr + SQUARE.product, scratch_ptr, FACTOR)
        if tl.load(job_ptr + SQUARE.spill) == 0:
            mirror_lower(product_ptr, d, padded(d), tile, BLOCK)
        else:
            copy_ptr = pointer_at(job_ptr + SQUARE.copy, scratch_ptr, FACTOR)
            mirror_lower(product_ptr, d, d, tile, BLOCK)
            mirror_lower(copy_ptr, d, padded(d), tile, BLOCK)
    if tl.load(job_ptr + SQUARE.state) != 0:
        state_ptr = pointer_at(job_ptr + SQUARE.state, scratch_ptr, FACTOR)
        _copy_part(k_ptr, state_ptr, d, tile, BLOCK)
        if tile[0] != tile[1]:
            _copy_part(k_ptr, state_ptr, d, (tile[1], tile[0]), BLOCK)
