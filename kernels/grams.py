"""The averaged factors S of root-free Shampoo, in Triton.

    grams        S <- S + (1 - beta2) (seen seen^T / e - S)

For an axis of d entries, e those of the other, and `seen` Y (or Z^T) with this axis as its rows; of
a diagonal S sums of squares are all that is seen.

Shapes: S (d, d), or (d,) where it is diagonal. Dtypes: GEMM operands bfloat16 or float32,
accumulated in float32; S float32, of which kernels/roots.py reads a copy in the GEMM dtype. FLOPs:
d^2 e, of which a program computes one tile on or below the diagonal and stores it twice, the second
time transposed. Where G is exactly zero, S is left alone. A program works on one tile of one job, a
row of `Gram`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .factors import sum_rows
from .rootfree_shampoo_slots import GRAM, SHAMPOO
from .slots import LAYOUT, SIDE
from .tiles import (
    find_tile,
    mirror_lower,
    padded,
    pointer_at,
    product_tile,
    quarters,
    ragged_pointer_at,
    size_at,
    spill,
    spilled,
    store_symmetric,
    tile_of,
)


@triton.jit
def is_idle(column_ptr, scratch_ptr):
    """Whether a gradient is exactly zero, which leaves S and K alone."""
    return tl.load(ragged_pointer_at(column_ptr, scratch_ptr, tl.float32)) == 0


@triton.jit
def _weights(scalars_ptr):
    """beta2 and 1 - beta2."""
    one_minus_beta2 = tl.load(scalars_ptr + SHAMPOO.one_minus_beta2)
    return tl.load(scalars_ptr + SHAMPOO.beta2), one_minus_beta2


@triton.jit
def _update_gram_part(ptr, d, stride, copy_ptr, seen, weights, part, is_diagonal):
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, seen.shape[0], seen.shape[1])
    s = tl.load(ptrs, mask=mask, other=0.0)
    s = decayed(s, seen, weights[0], weights[1])
    store_symmetric(ptr, d, stride, s, part, is_diagonal)
    store_symmetric(copy_ptr, d, padded(d), s, part, is_diagonal)


@triton.jit
def diagonal_of(column_ptr, scratch_ptr, d, offs):
    ptr = ragged_pointer_at(column_ptr, scratch_ptr, tl.float32)
    return tl.load(ptr + offs.to(tl.int64) * (d + 1), mask=offs < d, other=0.0)


@triton.jit
def _update_gram_tile(
    job_ptr, scratch_ptr, d, product, scalars_ptr, tile, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """S, its copy and its trace, from a tile of Y Y^T."""
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    seen = product * (1.0 / size_at(job_ptr + GRAM.others))
    weights = _weights(scalars_ptr)
    copy_ptr = pointer_at(job_ptr + GRAM.copy, scratch_ptr, FACTOR)
    is_diagonal = tile[0] == tile[1]
    if tl.load(job_ptr + GRAM.spill) == 0:  # rows are aligned
        gram_ptr = pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32)
        parts = quarters(seen)
        for i in tl.static_range(4):
            part = (tile[0], 4 * tile[1] + i)
            _update_gram_part(
                gram_ptr, d, padded(d), copy_ptr, parts[i], weights, part, is_diagonal
            )
    else:
        ragged_ptr = ragged_pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32)
        spill_ptr = pointer_at(job_ptr + GRAM.spill, scratch_ptr, tl.float32)
        spill(seen, spill_ptr, (d, d), tile)
        for i in range(BLOCK // ROWS):
            part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
            seen_part = spilled(spill_ptr, (d, d), part, ROWS, BLOCK)
            _update_gram_part(ragged_ptr, d, d, copy_ptr, seen_part, weights, part, is_diagonal)
    if is_diagonal:
        if tl.float32 == FACTOR:
            mirror_lower(
                ragged_pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32), d, d, tile, BLOCK
            )
            mirror_lower(copy_ptr, d, padded(d), tile, BLOCK)
        tl.debug_barrier()
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        diagonal = diagonal_of(job_ptr + GRAM.gram, scratch_ptr, d, offs)
        trace_ptr = ragged_pointer_at(job_ptr + GRAM.trace, scratch_ptr, tl.float32)
        tl.store(trace_ptr + tile[0], tl.sum(diagonal, 0))


@triton.jit
def _update_diagonal_gram(job_ptr, scratch_ptr, d, e, scalars_ptr, pid, BLOCK: tl.constexpr):
    """Returns the block's sum."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    seen_ptr = pointer_at(job_ptr + GRAM.seen, scratch_ptr, tl.float32)
    seen = sum_rows(seen_ptr, d, size_at(job_ptr + GRAM.columns), pid, BLOCK) / e
    ptrs = ragged_pointer_at(job_ptr + GRAM.gram, scratch_ptr, tl.float32) + offs
    s = tl.load(ptrs, mask=offs < d, other=0.0)
    weights = _weights(scalars_ptr)
    s = decayed(s, seen, weights[0], weights[1])
    tl.debug_barrier()  # several threads may hold an entry: each has read it before one writes
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
    if is_idle(job_ptr + GRAM.nonzero, scratch_ptr):
        return
    d, e = (size_at(job_ptr + GRAM.size), size_at(job_ptr + GRAM.others))
    side = tl.load(job_ptr + GRAM.side)
    if side == SIDE.diagonal:
        trace = _update_diagonal_gram(job_ptr, scratch_ptr, d, e, scalars_ptr, tile[0], BLOCK)
        trace_ptr = ragged_pointer_at(job_ptr + GRAM.trace, scratch_ptr, tl.float32)
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
        _update_gram_tile(job_ptr, scratch_ptr, d, gram, scalars_ptr, tile, FACTOR, BLOCK)
