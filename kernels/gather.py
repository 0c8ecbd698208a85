"""The gather of IF-Shampoo, in Triton: copies that GEMMs read, limited gradients, sums over them.

Shapes and dtypes are those of kernels/matrix.py. A program works on one tile of one matrix, found
through a job table (kernels/matrix_jobs.py); a job has in its columns

    source, target, rows, columns, partial sums of squares | of G, counts of elements other than 0,
    kind, aligned

Each element is read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import find_tile, padded, pointer_at, size_at, tile_of

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
