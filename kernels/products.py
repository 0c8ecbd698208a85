"""The gather of IF-Shampoo and its products that have no factor's epilogue, in Triton.

    gather           G -> GEMM dtype, limited; old factors -> copies, partial ||factor||_F^2
    left, right      T = C^T G, M = T K, also with diagonal factors     (and `precondition`)
    products         P = K K^T

Shapes and dtypes are those of kernels/matrix.py: GEMM operands bfloat16 or float32, accumulated in
float32 and rounded once, at the write. FLOPs: 2 m n k a product, half of 2 d^3 for K K^T. The
gather reads and writes each element once.

A program works on one tile of one matrix, found through a job table (kernels/matrix_jobs.py); a job
has, by launch, in its columns

    gather           source, target, rows, columns, partial sums of squares | of G, counts of
                     elements other than 0, kind, aligned
    left, right      A, its columns, B, its columns, output, -, m, n, k, row scales, column scales,
                     row sums of squares, column sums of squares
    products         K, product, d, copy, where tiles are parked

where a product's k of 0 means that both factors are diagonal: A is G, in float32, and the tile is A
scaled. Of K K^T a program computes one tile on or below the diagonal and stores it twice, the
second time transposed.

`_stacked_products_kernel` is for stacks of aligned matrices on Hopper, as `_stacked_factors_kernel`
in kernels/factors.py is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    MATRIX,
    PARKED_ROWS,
    find_tile,
    padded,
    park,
    parked,
    pointer_at,
    product_of,
    product_tile,
    scales,
    size_at,
    stacked_product_tile,
    store_symmetric,
    store_symmetric_tile,
    tile_at,
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
    source_ptr, stride, target_ptr, size, sums_ptr, IS_GRAD, unscale, tile, BLOCK_M, BLOCK_N
):
    """Copy a tile of rows `stride` apart into padded ones, and store a sum over its elements."""
    ptrs, mask = tile_of(source_ptr, stride, (size[0], stride), tile, BLOCK_M, BLOCK_N)
    value = tl.load(ptrs, mask=mask, other=0.0)
    if IS_GRAD:
        value = value.to(tl.float32)
        if unscale is not None:
            value *= unscale
        value = _limited(value)
    target = padded(size[1])
    ptrs, mask = tile_of(target_ptr, target, (size[0], target), tile, BLOCK_M, BLOCK_N)
    tl.store(ptrs, value.to(target_ptr.dtype.element_ty), mask=mask)
    if sums_ptr.to(tl.int64) != 0:
        wide = value.to(tl.float32)
        terms = tl.where(wide != 0, 1.0, 0.0) if IS_GRAD else wide * wide
        tl.store(sums_ptr, tl.sum(tl.sum(terms, 1), 0))


@triton.jit
def _copy_tile(
    source_ptr, aligned, target_ptr, size, sums_ptr, IS_GRAD, unscale, tile, BLOCK_M, BLOCK_N
):
    if aligned:
        stride = padded(size[1])
        _copy_rows(
            source_ptr, stride, target_ptr, size, sums_ptr, IS_GRAD, unscale, tile, BLOCK_M, BLOCK_N
        )
    else:
        _copy_rows(
            source_ptr,
            size[1],
            target_ptr,
            size,
            sums_ptr,
            IS_GRAD,
            unscale,
            tile,
            BLOCK_M,
            BLOCK_N,
        )


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
    job_ptr, tile, place = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + 2), size_at(job_ptr + 3))
    kind = tl.load(job_ptr + 5)
    sums_ptr = pointer_at(job_ptr + 4, scratch_ptr, tl.float32)
    if sums_ptr.to(tl.int64) != 0:
        sums_ptr += place
    if kind == 0:  # a factor or a product
        source_ptr = pointer_at(job_ptr, scratch_ptr, FACTOR)
        target_ptr = pointer_at(job_ptr + 1, scratch_ptr, FACTOR)
        aligned = tl.load(job_ptr + 6) != 0
        _copy_tile(
            source_ptr, aligned, target_ptr, size, sums_ptr, False, None, tile, BLOCK_M, BLOCK_N
        )
    else:
        unscale = None
        if grad_scale_ptr is not None:
            unscale = 1.0 / tl.load(grad_scale_ptr).to(tl.float32)
        member_ptr = members_ptr + 4 * tl.load(job_ptr)
        grad_ptr = pointer_at(member_ptr + 1, scratch_ptr, GRAD)
        aligned = size[1] % 8 == 0
        if kind == 1:
            target_ptr = pointer_at(job_ptr + 1, scratch_ptr, FACTOR)
            _copy_tile(
                grad_ptr, aligned, target_ptr, size, sums_ptr, True, unscale, tile, BLOCK_M, BLOCK_N
            )
        else:  # both factors are diagonal, and no GEMM will read it
            wide_ptr = pointer_at(job_ptr + 1, scratch_ptr, tl.float32)
            _copy_tile(
                grad_ptr, aligned, wide_ptr, size, sums_ptr, True, unscale, tile, BLOCK_M, BLOCK_N
            )


@triton.jit
def _store_scaled(job_ptr, scratch_ptr, out_ptr, value, size, part):
    """A part of a tile times the diagonal factors; returns its sums of squares by columns."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    m, n = size
    rows = scales(pointer_at(job_ptr + 9, scratch_ptr, tl.float32), m, part[0], ROWS)
    columns = scales(pointer_at(job_ptr + 10, scratch_ptr, tl.float32), n, part[1], COLUMNS)
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
    acc = product_of(job_ptr, scratch_ptr, size, tile, TRANS_A, FACTOR, BLOCK, BLOCK_K, PRECISION)
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
            store_symmetric(product_ptr, d, d, product, part, is_diagonal)
            store_symmetric(copy_ptr, d, padded(d), product, part, is_diagonal)


@triton.jit(do_not_specialize=["count"])
def _stacked_products_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    count,
    factors,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        job_ptr, tile, _ = tile_at(tiles_ptr, jobs_ptr, index)
        matrix = size_at(job_ptr + MATRIX)
        d = size_at(job_ptr + 2)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = stacked_product_tile(factors, factors, acc, d, matrix, tile, True, BLOCK_K)
        store_symmetric_tile(pointer_at(job_ptr + 1, scratch_ptr, FACTOR), d, acc, tile)
