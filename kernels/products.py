"""The gather of IF-Shampoo and its products that have no factor's epilogue, in Triton.

    gather           G -> GEMM dtype, limited; old factors -> copies, partial ||factor||_F^2
    left, right      T = C^T G, M = T K, also with diagonal factors     (and `precondition`)
    products         P = K K^T

Shapes and dtypes are those of kernels/matrix.py: GEMM operands bfloat16 or float32, accumulated in
float32 and rounded once, at the write. FLOPs: 2 m n k a product, half of 2 d^3 for K K^T. The
gather reads and writes each element once.

A program works on one tile of one job: a row of `slots.Gather`, `slots.Product` or `slots.Square`.
Of K K^T it computes one tile on or below the diagonal and stores it twice, the second time
transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import inverse_of, skips
from .slots import GATHER, GATHERED, LAYOUT, MEMBER, PRODUCT, SQUARE
from .tiles import (
    find_tile,
    padded,
    pointer_at,
    product_tile,
    ragged_pointer_at,
    scales,
    size_at,
    spill,
    spilled,
    store_symmetric,
    store_symmetric_tile,
    tile_of,
)

# Limit of the specification: products of G stay finite.
_LARGEST = tl.constexpr(2.0**40)


@triton.jit
def _limited(g):
    within = tl.clamp(g, -_LARGEST, _LARGEST)
    return tl.where(tl.abs(g) < float("inf"), within, g)


@triton.jit
def _copy_rows(
    source_ptr, stride, target_ptr, size, target, sums_ptr, IS_GRAD, unscale, tile, BLOCK_M, BLOCK_N
):
    """Copy a tile of rows `stride` apart into padded ones, and store a sum over its elements.

    size and target: the rows and columns of the source and of the target, which has zeros beyond.
    """
    ptrs, mask = tile_of(source_ptr, stride, (size[0], stride), tile, BLOCK_M, BLOCK_N)
    value = tl.load(ptrs, mask=mask, other=0.0)
    if IS_GRAD:
        value = value.to(tl.float32)
        if unscale is not None:
            value *= unscale
        value = _limited(value)
    even = padded(target[1])
    ptrs, mask = tile_of(target_ptr, even, (target[0], even), tile, BLOCK_M, BLOCK_N)
    tl.store(ptrs, value.to(target_ptr.dtype.element_ty), mask=mask)
    if sums_ptr.to(tl.int64) != 0:
        wide = value.to(tl.float32)
        terms = tl.where(wide != 0, 1.0, 0.0) if IS_GRAD else wide * wide
        tl.store(sums_ptr, tl.sum(tl.sum(terms, 1), 0))


@triton.jit
def copy_tile(
    source_ptr, aligned, target_ptr, size, target, sums_ptr, IS_GRAD, unscale, tile,
    BLOCK_M, BLOCK_N,
):  # fmt: skip
    if aligned:
        stride = padded(size[1])
        _copy_rows(
            source_ptr, stride, target_ptr, size, target, sums_ptr, IS_GRAD, unscale, tile,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _copy_rows(
            source_ptr, size[1], target_ptr, size, target, sums_ptr, IS_GRAD, unscale, tile,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr"])
def _gather_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    grad_scale_ptr,
    GRAD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + GATHER.rows), size_at(job_ptr + GATHER.columns))
    target = (size_at(job_ptr + GATHER.target_rows), size_at(job_ptr + GATHER.target_columns))
    gathered = tl.load(job_ptr + GATHER.gathered)
    sums_ptr = ragged_pointer_at(job_ptr + GATHER.sums, scratch_ptr, tl.float32)
    if sums_ptr.to(tl.int64) != 0:
        sums_ptr += index
    if gathered == GATHERED.state:
        target_ptr = pointer_at(job_ptr + GATHER.target, scratch_ptr, FACTOR)
        if tl.load(job_ptr + GATHER.aligned) != 0:
            source_ptr = pointer_at(job_ptr + GATHER.source, scratch_ptr, FACTOR)
            copy_tile(
                source_ptr, True, target_ptr, size, target, sums_ptr, False, None, tile,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            ragged_ptr = ragged_pointer_at(job_ptr + GATHER.source, scratch_ptr, FACTOR)
            copy_tile(
                ragged_ptr, False, target_ptr, size, target, sums_ptr, False, None, tile,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        unscale = inverse_of(grad_scale_ptr)
        member_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + GATHER.source)
        grad_ptr = pointer_at(member_ptr + MEMBER.grad, scratch_ptr, GRAD)
        aligned = size[1] % LAYOUT.row_multiple == 0
        if gathered == GATHERED.gradient:
            target_ptr = pointer_at(job_ptr + GATHER.target, scratch_ptr, FACTOR)
            copy_tile(
                grad_ptr, aligned, target_ptr, size, target, sums_ptr, True, unscale, tile,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:  # a wide gradient
            wide_ptr = pointer_at(job_ptr + GATHER.target, scratch_ptr, tl.float32)
            copy_tile(
                grad_ptr, aligned, wide_ptr, size, target, sums_ptr, True, unscale, tile,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def store_scaled(pointers, out_ptr, columns, value, size, part, SQUARED: tl.constexpr):
    """`store_summed` of a part of a tile times the diagonal factors.

    pointers: of the factors of the rows and of the columns, and of sums of squares by rows. Each
    may be null, as out_ptr may. SQUARED: whether it is times the squares of the factors.
    """
    value = times_diagonals(pointers[0], pointers[1], value, size, part, SQUARED)
    return store_summed(out_ptr, columns, pointers[2], value, size, part)


@triton.jit
def times_diagonals(rows_ptr, columns_ptr, value, size, part, SQUARED: tl.constexpr):
    rows = scales(rows_ptr, size[0], part[0], value.shape[0])
    columns = scales(columns_ptr, size[1], part[1], value.shape[1])
    if SQUARED:
        rows *= rows
        columns *= columns
    return value * (rows[:, None] * columns[None, :])


@triton.jit
def store_summed(out_ptr, columns, row_sums_ptr, value, size, part):
    """Store a part of a tile; returns its sums of squares by columns, as it is rounded.

    columns: of the rows that it is stored into. Sums by rows are stored a tile column after
    another. Either pointer may be null.
    """
    if out_ptr.to(tl.int64) != 0:
        value = store_rounded(out_ptr, columns, value, size, part)
    store_row_sums(row_sums_ptr, size[0], tl.sum(value * value, 1), size[0], part)
    return tl.sum(value * value, 0)


@triton.jit
def store_rounded(out_ptr, columns, value, size, part):
    """Store a part of a matrix into padded rows of so many columns; returns it as it is rounded."""
    even = (size[0], padded(size[1]))
    ptrs, mask = tile_of(out_ptr, padded(columns), even, part, value.shape[0], value.shape[1])
    rounded = value.to(out_ptr.dtype.element_ty)
    tl.store(ptrs, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def store_row_sums(ptr, stride, sums, m, part):
    """A tile column after another, `stride` apart; nowhere where ptr is null."""
    if ptr.to(tl.int64) != 0:
        offs_m = part[0] * sums.shape[0] + tl.arange(0, sums.shape[0])
        tl.store(ptr + part[1].to(tl.int64) * stride + offs_m, sums, mask=offs_m < m)


@triton.jit
def store_column_sums(ptr, sums, n, tile):
    """What `store_scaled` returned, a tile row after another; nowhere where ptr is null."""
    if ptr.to(tl.int64) != 0:
        offs_n = tile[1] * sums.shape[0] + tl.arange(0, sums.shape[0])
        tl.store(ptr + tile[0].to(tl.int64) * n + offs_n, sums, mask=offs_n < n)


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
    size = (
        size_at(job_ptr + PRODUCT.m),
        size_at(job_ptr + PRODUCT.n),
        size_at(job_ptr + PRODUCT.k),
    )
    m, n, k = size
    a_ptr = pointer_at(job_ptr + PRODUCT.a, scratch_ptr, FACTOR)
    b_ptr = pointer_at(job_ptr + PRODUCT.b, scratch_ptr, FACTOR)
    a = (a_ptr, size_at(job_ptr + PRODUCT.a_columns))
    b = (b_ptr, size_at(job_ptr + PRODUCT.b_columns))
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(a, b, acc, size, tile, TRANS_A, False, BLOCK_K, PRECISION)
    out_ptr = pointer_at(job_ptr + PRODUCT.output, scratch_ptr, FACTOR)
    columns = size_at(job_ptr + PRODUCT.output_columns)
    scaled = tl.load(job_ptr + PRODUCT.row_scales) | tl.load(job_ptr + PRODUCT.column_scales)
    if scaled == 0:  # both factors are dense
        ptrs, mask = tile_of(out_ptr, padded(columns), (m, padded(n)), tile, BLOCK, BLOCK)
        tl.store(ptrs, acc.to(FACTOR), mask=mask)
    else:
        pointers = (
            ragged_pointer_at(job_ptr + PRODUCT.row_scales, scratch_ptr, tl.float32),
            ragged_pointer_at(job_ptr + PRODUCT.column_scales, scratch_ptr, tl.float32),
            ragged_pointer_at(job_ptr + PRODUCT.row_sums, scratch_ptr, tl.float32),
        )
        if k > 0:
            sums = store_scaled(pointers, out_ptr, columns, acc, (m, n), tile, False)
        else:  # both are diagonal
            source_ptr = pointer_at(job_ptr + PRODUCT.a, scratch_ptr, tl.float32)
            sums = tl.zeros([BLOCK], tl.float32)
            for i in range(BLOCK // LAYOUT.spilled_rows):
                part = (tile[0] * (BLOCK // LAYOUT.spilled_rows) + i, tile[1])
                rows = spilled(source_ptr, (m, n), part, LAYOUT.spilled_rows, BLOCK)
                sums += store_scaled(pointers, out_ptr, columns, rows, (m, n), part, False)
        sums_ptr = ragged_pointer_at(job_ptr + PRODUCT.column_sums, scratch_ptr, tl.float32)
        store_column_sums(sums_ptr, sums, n, tile)


@triton.jit
def finish_product(
    job_ptr, scratch_ptr, square, tile, _, _scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Store a tile of K K^T, and its mirror image, as a row of `slots.Square` says."""
    d = size_at(job_ptr + SQUARE.size)
    aligned = True
    if RAGGED:
        aligned = tl.load(job_ptr + SQUARE.spill) == 0
    if aligned:
        product_ptr = pointer_at(job_ptr + SQUARE.product, scratch_ptr, FACTOR)
        store_symmetric_tile(product_ptr, d, square, tile)
    else:
        ragged_ptr = ragged_pointer_at(job_ptr + SQUARE.product, scratch_ptr, FACTOR)
        is_diagonal = tile[0] == tile[1]
        spill_ptr = pointer_at(job_ptr + SQUARE.spill, scratch_ptr, tl.float32)
        copy_ptr = pointer_at(job_ptr + SQUARE.copy, scratch_ptr, FACTOR)
        spill(square, spill_ptr, (d, d), tile)
        for i in range(BLOCK // LAYOUT.spilled_rows):
            part = (tile[0] * (BLOCK // LAYOUT.spilled_rows) + i, tile[1])
            product = spilled(spill_ptr, (d, d), part, LAYOUT.spilled_rows, BLOCK)
            store_symmetric(ragged_ptr, d, d, product, part, is_diagonal)
            store_symmetric(copy_ptr, d, padded(d), product, part, is_diagonal)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _products_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Factors that were skipped have left no operand in the scratch.
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    d = size_at(job_ptr + SQUARE.size)
    factor = (pointer_at(job_ptr + SQUARE.factor, scratch_ptr, FACTOR), d)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = product_tile(factor, factor, acc, (d, d, d), tile, False, True, BLOCK_K, PRECISION)
    finish_product(job_ptr, scratch_ptr, acc, tile, None, None, FACTOR, BLOCK, True)
