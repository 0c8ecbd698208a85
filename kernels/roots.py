"""The update of K of root-free Shampoo, in Triton: five launches, an axis a job.

For an axis of d entries, with S of this step (kernels/grams.py):

    damped       T = S K + lam K,   lam = damping mean(diag S)       (K = (s + lam)^(-1/2) itself
                                                                      where the axis is diagonal)
    residuals    E = K^T T - I;   ||E||_F^2
    squares      ||E E||_F^2
    roots        K <- K - b / 2 K E,   b = 1 / max(1, min(||E||_F, sqrt(||E E||_F)))
    inverses     X = K K^T

Shapes: S, K, T, E, X (d, d), a diagonal s and K (d,). Dtypes: GEMM operands, T, E and X bfloat16
or float32, accumulated in float32 and rounded once, at the write: E after the -I. Of S, T reads a
copy in the GEMM dtype; of stacks lam is added to its diagonal first, and T is one product of the
vendor's. K of a bfloat16 axis has a residual (reference.split). FLOPs: 2 d^3 for T and for K, d^3
for E, E E and X, of which a program computes one tile on or below the diagonal and stores it twice,
the second time transposed; of E E nothing is stored.

The products of `roots` read K, so its new bfloat16 half goes to the scratch, whence `inverses`,
which has every tile of it as an operand, copies it to the state. Where rows are not aligned GEMMs
read copies from the first, and `roots` writes the state. Where G is exactly zero, K is left alone.
A program works on one tile of one job: a row of `kernels/rootfree_shampoo_slots.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import skips
from .factors import update_factor_tile, update_ragged_factor_tile
from .grams import diagonal_of, is_idle
from .products import finish_product
from .rootfree_shampoo_slots import DAMPED, DAMPING, ROOT, SHAMPOO, SYMMETRIC
from .slots import SQUARE
from .tiles import (
    find_tile,
    mirror_lower,
    padded,
    pointer_at,
    product_tile,
    quarters,
    ragged_pointer_at,
    size_at,
    store_symmetric,
    sum_of,
    tile_of,
)


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
    if is_idle(job_ptr + DAMPED.nonzero, scratch_ptr):
        return
    d = size_at(job_ptr + DAMPED.size)
    trace_ptr = ragged_pointer_at(job_ptr + DAMPED.trace, scratch_ptr, tl.float32)
    trace = sum_of(trace_ptr, size_at(job_ptr + DAMPED.trace_count), False, BLOCK)
    damping = tl.load(scalars_ptr + SHAMPOO.damping) * trace / size_at(job_ptr + DAMPED.axis)
    kind = tl.load(job_ptr + DAMPED.damping)
    offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
    if kind == DAMPING.root:
        s_ptr = ragged_pointer_at(job_ptr + DAMPED.gram, scratch_ptr, tl.float32)
        s = tl.load(s_ptr + offs, mask=offs < d, other=1.0)
        root_ptr = ragged_pointer_at(job_ptr + DAMPED.factor, scratch_ptr, tl.float32)
        tl.store(root_ptr + offs, 1.0 / tl.sqrt(s + damping), mask=offs < d)
    elif kind == DAMPING.sum:
        s = diagonal_of(job_ptr + DAMPED.gram, scratch_ptr, d, offs)
        copy_ptr = pointer_at(job_ptr + DAMPED.output, scratch_ptr, FACTOR)
        copy_ptrs = copy_ptr + offs.to(tl.int64) * (padded(d) + 1)
        tl.store(copy_ptrs, (s + damping).to(FACTOR), mask=offs < d)
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
def _store_residual_part(ptr, d, lives, product, part, is_diagonal):
    """E from K^T T; returns its sums of squares by rows, those of the mirror image with them."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    offs_m = part[0] * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = part[1] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    e = product - tl.where((offs_m == offs_n) & (offs_m < lives), 1.0, 0.0)
    e = e.to(ptr.dtype.element_ty)
    store_symmetric(ptr, d, padded(d), e, part, is_diagonal)
    e = e.to(tl.float32)
    times = tl.where(offs_m > offs_n, 2.0, tl.where(offs_m == offs_n, 1.0, 0.0))
    return tl.sum(times * e * e, 1)


@triton.jit
def finish_square(
    job_ptr, scratch_ptr, product, tile, index, _scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What a tile of E E adds to ||E E||_F^2."""
    norms_ptr = pointer_at(job_ptr + SYMMETRIC.norms, scratch_ptr, tl.float32)
    norm = tl.sum(tl.sum(product * product, 1), 0) * tl.where(tile[0] == tile[1], 1.0, 2.0)
    tl.store(norms_ptr + index, norm)


@triton.jit
def _symmetric_product(
    job_ptr, scratch_ptr, tile, TRANS_A: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d = size_at(job_ptr + SYMMETRIC.size)
    a = (pointer_at(job_ptr + SYMMETRIC.a, scratch_ptr, FACTOR), d)
    b = (pointer_at(job_ptr + SYMMETRIC.b, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    return product_tile(a, b, acc, (d, d, d), tile, TRANS_A, False, BLOCK_K, PRECISION)


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
    if is_idle(job_ptr + SYMMETRIC.nonzero, scratch_ptr):
        return
    acc = _symmetric_product(job_ptr, scratch_ptr, tile, True, FACTOR, BLOCK, BLOCK_K, PRECISION)
    d = size_at(job_ptr + SYMMETRIC.size)
    lives = size_at(job_ptr + SYMMETRIC.lives)
    out_ptr = pointer_at(job_ptr + SYMMETRIC.output, scratch_ptr, FACTOR)
    parts = quarters(acc)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        sums += _store_residual_part(out_ptr, d, lives, parts[i], part, tile[0] == tile[1])
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
    if is_idle(job_ptr + SYMMETRIC.nonzero, scratch_ptr):
        return
    acc = _symmetric_product(job_ptr, scratch_ptr, tile, False, FACTOR, BLOCK, BLOCK_K, PRECISION)
    finish_square(job_ptr, scratch_ptr, acc, tile, index, None, FACTOR, BLOCK, True)


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
    return tl.where(is_idle(job_ptr + ROOT.nonzero, scratch_ptr), 0.0, step)


@triton.jit
def finish_root(
    job_ptr, scratch_ptr, product, tile, _, _scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A tile of K after the step, from one of K E."""
    d = size_at(job_ptr + ROOT.size)
    step = _root_step(job_ptr, scratch_ptr, BLOCK)
    aligned = True
    if RAGGED:
        aligned = tl.load(job_ptr + ROOT.spill) == 0
    if aligned:
        factor_ptr = pointer_at(job_ptr + ROOT.factor, scratch_ptr, FACTOR)
        target_ptr = pointer_at(job_ptr + ROOT.target, scratch_ptr, FACTOR)
        low_ptr = pointer_at(job_ptr + ROOT.low, scratch_ptr, tl.int16)
        update_factor_tile(factor_ptr, target_ptr, low_ptr, d, product, step, tile)
    else:
        ragged_ptr = ragged_pointer_at(job_ptr + ROOT.factor, scratch_ptr, FACTOR)
        ragged_low_ptr = ragged_pointer_at(job_ptr + ROOT.low, scratch_ptr, tl.int16)
        spill_ptr = pointer_at(job_ptr + ROOT.spill, scratch_ptr, tl.float32)
        copy_ptr = pointer_at(job_ptr + ROOT.copy, scratch_ptr, FACTOR)
        update_ragged_factor_tile(
            ragged_ptr, ragged_low_ptr, d, copy_ptr, spill_ptr, product, step, tile, BLOCK
        )


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
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + ROOT.size)
    k = (pointer_at(job_ptr + ROOT.operand, scratch_ptr, FACTOR), d)
    e = (pointer_at(job_ptr + ROOT.residual, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(k, e, acc, (d, d, d), tile, False, False, BLOCK_K, PRECISION)
    finish_root(job_ptr, scratch_ptr, acc, tile, index, None, FACTOR, BLOCK, True)


@triton.jit
def _copy_part(source_ptr, target_ptr, d, part, BLOCK: tl.constexpr):
    source, mask = tile_of(source_ptr, padded(d), (d, padded(d)), part, BLOCK, BLOCK)
    target, _ = tile_of(target_ptr, padded(d), (d, padded(d)), part, BLOCK, BLOCK)
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit
def finish_inverse(
    job_ptr, scratch_ptr, product, tile, index, _scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A tile of X; where K lies in the scratch, its tiles are copied to the state."""
    finish_product(job_ptr, scratch_ptr, product, tile, index, None, FACTOR, BLOCK, RAGGED)
    d = size_at(job_ptr + SQUARE.size)
    if tl.float32 == FACTOR and tile[0] == tile[1]:  # symmetric but for rounding
        if tl.load(job_ptr + SQUARE.spill) == 0:
            product_ptr = pointer_at(job_ptr + SQUARE.product, scratch_ptr, FACTOR)
            mirror_lower(product_ptr, d, padded(d), tile, BLOCK)
        else:
            ragged_ptr = ragged_pointer_at(job_ptr + SQUARE.product, scratch_ptr, FACTOR)
            copy_ptr = pointer_at(job_ptr + SQUARE.copy, scratch_ptr, FACTOR)
            mirror_lower(ragged_ptr, d, d, tile, BLOCK)
            mirror_lower(copy_ptr, d, padded(d), tile, BLOCK)
    if tl.load(job_ptr + SQUARE.state) != 0:
        k_ptr = pointer_at(job_ptr + SQUARE.factor, scratch_ptr, FACTOR)
        state_ptr = pointer_at(job_ptr + SQUARE.state, scratch_ptr, FACTOR)
        _copy_part(k_ptr, state_ptr, d, tile, BLOCK)
        if tile[0] != tile[1]:
            _copy_part(k_ptr, state_ptr, d, (tile[1], tile[0]), BLOCK)


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
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + SQUARE.size)
    k = (pointer_at(job_ptr + SQUARE.factor, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(k, k, acc, (d, d, d), tile, False, True, BLOCK_K, PRECISION)
    finish_inverse(job_ptr, scratch_ptr, acc, tile, index, None, FACTOR, BLOCK, True)
