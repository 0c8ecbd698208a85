"""Products of stacks of aligned matrices, on Hopper: one kernel for all that have an epilogue.

The operands of a bucket are stacks, so one tensor descriptor a stack, made on the host, serves all
of its matrices: the tensor memory accelerator reads whole tiles, and zeros beyond the edge of each.
As many programs as a GPU holds share the tiles of a launch, so that the products of one hide the
epilogue of another. FINISH is what the table kernel of the same name does with a tile, on the
same rows of jobs, so both give the same bits.

Shapes: A (m, k) and B (k, n) of every matrix, B also as its transpose. Dtypes: bfloat16,
accumulated in float32. FLOPs: 2 m n k, or those of the tiles that the launch has alone.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .arithmetic import skips
from .slots import LAYOUT
from .tiles import size_at, tile_at


@triton.jit
def _product_tile(a, b, acc, matrix, tile, TRANS_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + a tile of A B, or A B^T, of a matrix of two stacks.

    a and b are descriptors of (matrices, rows, columns) with blocks of one matrix: beyond the edge
    of each matrix are zeros, never the neighbour.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    row, column = tile[0] * BLOCK_M, tile[1] * BLOCK_N
    for done in range(0, a.shape[2], BLOCK_K):
        a_tile = a.load([matrix, row, done]).reshape(BLOCK_M, BLOCK_K)
        if TRANS_B:
            b_tile = tl.trans(b.load([matrix, column, done]).reshape(BLOCK_N, BLOCK_K))
        else:
            b_tile = b.load([matrix, done, column]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(a_tile, b_tile, acc)
    return acc


def _name(specialization: Any) -> str:
    """What a profiler shows: the launch's."""
    finish = specialization.constants["FINISH"].__name__.removeprefix("finish_")
    return f"_stacked_{finish}s_kernel"


@triton.jit(
    repr=_name, do_not_specialize=["count"], do_not_specialize_on_alignment=["found_inf_ptr"]
)
def _stacked_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    count,
    a,
    b,
    scalars_ptr,
    found_inf_ptr,
    FINISH: tl.constexpr,
    TRANS_B: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    for position in range(tl.program_id(0), count, tl.num_programs(0)):
        job_ptr, tile, index = tile_at(tiles_ptr, jobs_ptr, position)
        matrix = size_at(job_ptr + LAYOUT.matrix)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = _product_tile(a, b, acc, matrix, tile, TRANS_B, BLOCK_K)
        FINISH(job_ptr, scratch_ptr, acc, tile, index, scalars_ptr, FACTOR, BLOCK, False)
