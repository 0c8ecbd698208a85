"""The factor update and the products K K^T of stacks of aligned matrices, in Triton, for Hopper.

Equations, jobs and epilogues are those of the kernels in products.py and factors.py, and so are the
results, to the bit; what differs is how operands are read and tiles dealt out. The factors and
momenta of a bucket are stacks, so one tensor descriptor a stack, made on the host, serves all
members: the tensor memory accelerator reads whole tiles, and zeros beyond the edge of each matrix.
As many programs as a GPU holds share the tiles of a launch, so that the products of one hide the
epilogue of another.

Operands are bfloat16, the accumulator float32. A job's last column is the matrix's place in its
stacks. `old` has copies of the factors, which the factors launch overwrites.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .factors import store_symmetric_tile
from .products import factor_step, update_factor_tile
from .tables import skips
from .tiles import MATRIX, pointer_at, size_at, stacked_product_tile, tile_at


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
        step = factor_step(job_ptr, scratch_ptr, scalars_ptr, BLOCK)
        old_ptr = pointer_at(job_ptr, scratch_ptr, FACTOR)
        factor_ptr = pointer_at(job_ptr + 3, scratch_ptr, FACTOR)
        residual_ptr = pointer_at(job_ptr + 4, scratch_ptr, tl.int16)
        update_factor_tile(old_ptr, factor_ptr, residual_ptr, d, acc, step, tile)


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
