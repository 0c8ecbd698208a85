"""The direction of root-free Shampoo and the descent, in Triton.

    directions   X_A N,  then  P = (X_A N) X_B;  sums of P's squares by row and by tile
    rows         r_i = mean_j P_ij^2 / rms(P)^2,   v <- v + max(1 - row_beta, 1 / step) (r - v)
    descend      P_i <- P_i / sqrt(v_i + 0.1)
                 p <- (1 - lr weight_decay) p - lr rms P / rms(P),
                 rms = update_rms 2 sqrt(256 m / n) / (sqrt(m) + sqrt(n))

Where an axis is diagonal P is X N or N X alone, with its rows or columns times the squares of K.
N's largest magnitude is taken out of P, so that its squares stay in range. Without row averages the
rows' launch is left out, and P is divided by its rms alone.

Shapes: N, P, p (m, n), v (m,). Dtypes: GEMM operands, X_A N and P bfloat16 or float32, accumulated
in float32 and rounded once, at the write; sums are of what was written. P float32 where both axes
are diagonal; v float32; p rounded once, at the write. FLOPs: 2 m n (m + n). Bytes an element of
float32 parameters: 12, and 10 for the descent. A program works on one tile of one job, a row of
`Direction`, `Rows` or `Descent`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .factors import sum_rows
from .gradients import PART_ROWS, inverse_root, largest_of
from .products import store_rounded, store_row_sums, store_scaled, times_diagonals
from .rootfree_shampoo_slots import DESCENT, DIRECTION, DTYPE, ROWS, SHAMPOO
from .slots import LAYOUT, MEMBER
from .tiles import (
    find_tile,
    padded,
    pointer_at,
    product_tile,
    quarters,
    ragged_pointer_at,
    scales,
    size_at,
    spilled,
    sum_of,
    tile_of,
)

# Added to the mean square of a row before it divides, as in the specification.
_ROW_DAMPING = tl.constexpr(0.1)
_REFERENCE_SIDE = tl.constexpr(256.0)


@triton.jit
def _direction_scale(job_ptr, scratch_ptr):
    """The inverse of N's largest magnitude, 1 where it is not to be taken out."""
    scale = 1.0
    if tl.load(job_ptr + DIRECTION.largest) != 0:
        largest_ptr = pointer_at(job_ptr + DIRECTION.largest, scratch_ptr, tl.float32)
        scale = 1.0 / largest_of(largest_ptr, size_at(job_ptr + DIRECTION.largest_count))
    return scale


@triton.jit
def _direction_pointers(job_ptr, scratch_ptr):
    return (
        ragged_pointer_at(job_ptr + DIRECTION.row_scales, scratch_ptr, tl.float32),
        ragged_pointer_at(job_ptr + DIRECTION.column_scales, scratch_ptr, tl.float32),
        ragged_pointer_at(job_ptr + DIRECTION.row_sums, scratch_ptr, tl.float32),
    )


@triton.jit
def _store_tile_sum(job_ptr, scratch_ptr, sums, index):
    if tl.load(job_ptr + DIRECTION.tile_sums) != 0:
        sums_ptr = ragged_pointer_at(job_ptr + DIRECTION.tile_sums, scratch_ptr, tl.float32)
        tl.store(sums_ptr + index, tl.sum(sums, 0))


@triton.jit
def finish_direction(
    job_ptr, scratch_ptr, product, tile, index, _scalars_ptr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Store a tile of X_A N or P, with its sums."""
    size = (size_at(job_ptr + DIRECTION.m), size_at(job_ptr + DIRECTION.n))
    scale = _direction_scale(job_ptr, scratch_ptr)
    out_ptr = pointer_at(job_ptr + DIRECTION.output, scratch_ptr, FACTOR)
    rows_ptr, columns_ptr, row_sums_ptr = _direction_pointers(job_ptr, scratch_ptr)
    columns = size_at(job_ptr + DIRECTION.output_columns)
    parts = quarters(product)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        value = parts[i] * scale
        if RAGGED:  # both axes of a stack are dense
            value = times_diagonals(rows_ptr, columns_ptr, value, size, part, True)
        value = store_rounded(out_ptr, columns, value, size, part)
        sums += tl.sum(value * value, 1)
    store_row_sums(row_sums_ptr, size_at(job_ptr + DIRECTION.sums_rows), sums, size[0], tile)
    _store_tile_sum(job_ptr, scratch_ptr, sums, index)


@triton.jit
def _scale_directions(job_ptr, scratch_ptr, tile, index, BLOCK: tl.constexpr):
    """Where both axes are diagonal P takes the place of N, a few rows at a time."""
    ROWS_AT_A_TIME: tl.constexpr = LAYOUT.spilled_rows
    size = (size_at(job_ptr + DIRECTION.m), size_at(job_ptr + DIRECTION.n))
    scale = _direction_scale(job_ptr, scratch_ptr)
    out_ptr = pointer_at(job_ptr + DIRECTION.output, scratch_ptr, tl.float32)
    pointers = _direction_pointers(job_ptr, scratch_ptr)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(BLOCK // ROWS_AT_A_TIME):
        part = (tile[0] * (BLOCK // ROWS_AT_A_TIME) + i, tile[1])
        rows = spilled(out_ptr, size, part, ROWS_AT_A_TIME, BLOCK) * scale
        sums += store_scaled(pointers, out_ptr, size[1], rows, size, part, True)
    _store_tile_sum(job_ptr, scratch_ptr, sums, index)


@triton.jit
def _directions_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    k = size_at(job_ptr + DIRECTION.k)
    if k > 0:
        m, n = (size_at(job_ptr + DIRECTION.m), size_at(job_ptr + DIRECTION.n))
        a_ptr = pointer_at(job_ptr + DIRECTION.a, scratch_ptr, FACTOR)
        b_ptr = pointer_at(job_ptr + DIRECTION.b, scratch_ptr, FACTOR)
        a = (a_ptr, size_at(job_ptr + DIRECTION.a_columns))
        b = (b_ptr, size_at(job_ptr + DIRECTION.b_columns))
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = product_tile(a, b, acc, (m, n, k), tile, False, False, BLOCK_K, PRECISION)
        finish_direction(job_ptr, scratch_ptr, acc, tile, index, None, FACTOR, BLOCK, True)
    else:
        _scale_directions(job_ptr, scratch_ptr, tile, index, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["steps_ptr", "found_inf_ptr"])
def _rows_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    steps_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    m, n = (size_at(job_ptr + ROWS.m), size_at(job_ptr + ROWS.n))
    member = tl.load(job_ptr + ROWS.member)
    sums_ptr = pointer_at(job_ptr + ROWS.tile_sums, scratch_ptr, tl.float32)
    total = sum_of(sums_ptr, size_at(job_ptr + ROWS.tile_sums_count), False, 1024)
    inverse = inverse_root(total / (m.to(tl.float32) * n.to(tl.float32)))
    row_sums_ptr = pointer_at(job_ptr + ROWS.row_sums, scratch_ptr, tl.float32)
    r = sum_rows(row_sums_ptr, m, size_at(job_ptr + ROWS.row_sums_count), tile[0], BLOCK_M)
    r *= inverse * inverse / n
    offs = tile[0] * BLOCK_M + tl.arange(0, BLOCK_M)
    # A row of a stack, of which nothing promises 16 bytes.
    v_ptr = tl.load(members_ptr + len(MEMBER) * member + MEMBER.averages)
    v_ptrs = v_ptr.to(tl.pointer_type(tl.float32)) + offs
    one_minus_row_beta = tl.load(scalars_ptr + SHAMPOO.one_minus_row_beta)
    change = tl.maximum(one_minus_row_beta, 1.0 / tl.load(steps_ptr + member))
    v = decayed(tl.load(v_ptrs, mask=offs < m, other=0.0), r, 1.0 - change, change)
    tl.debug_barrier()  # several threads may hold an entry: each has read it before one writes
    tl.store(v_ptrs, v, mask=offs < m)
    factors_ptr = pointer_at(job_ptr + ROWS.factors, scratch_ptr, tl.float32)
    tl.store(factors_ptr + offs, inverse / tl.sqrt(v + _ROW_DAMPING), mask=offs < m)
    totals_ptr = pointer_at(job_ptr + ROWS.totals, scratch_ptr, tl.float32)
    tl.store(totals_ptr + tile[0], tl.sum(r / (v + _ROW_DAMPING), 0))


@triton.jit
def _descend_part(
    p_ptr, stride, direction_ptr, even, size, factors_ptr, shared, decay, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m, n = size
    ptrs, mask = tile_of(direction_ptr, even, (m, padded(n)), part, ROWS, COLUMNS)
    u = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    factors = scales(factors_ptr, m, part[0], ROWS) * shared
    ptrs, mask = tile_of(p_ptr, stride, (m, stride), part, ROWS, COLUMNS)
    p = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    p = p - decay * p - factors[:, None] * u
    tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _descend_rows(
    job_ptr, scratch_ptr, p_ptr, stride, size, shared, decay, tile, DIRECTION_DTYPE,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_M // PART_ROWS
    direction_ptr = pointer_at(job_ptr + DESCENT.direction, scratch_ptr, DIRECTION_DTYPE)
    even = padded(size_at(job_ptr + DESCENT.columns))
    factors_ptr = pointer_at(job_ptr + DESCENT.factors, scratch_ptr, tl.float32)
    for i in range(PARTS):
        part = (tile[0] * PARTS + i, tile[1])
        _descend_part(
            p_ptr, stride, direction_ptr, even, size, factors_ptr, shared, decay, part,
            PART_ROWS, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _descend(
    job_ptr, scratch_ptr, p_ptr, size, shared, decay, tile, FACTOR,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = size[1]
    if tl.load(job_ptr + DESCENT.wide) != 0:
        _descend_rows(
            job_ptr, scratch_ptr, p_ptr, n, size, shared, decay, tile, tl.float32, BLOCK_M, BLOCK_N
        )
    elif n % LAYOUT.row_multiple == 0:
        _descend_rows(
            job_ptr, scratch_ptr, p_ptr, padded(n), size, shared, decay, tile, FACTOR,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _descend_rows(
            job_ptr, scratch_ptr, p_ptr, n, size, shared, decay, tile, FACTOR, BLOCK_M, BLOCK_N
        )


@triton.jit
def _shape_scale(size):
    """RMS of the update of an (m, n) matrix in units of that of a 256 x 256 one."""
    m, n = size[0].to(tl.float32), size[1].to(tl.float32)
    return tl.sqrt(m / n * _REFERENCE_SIDE) * 2.0 / (tl.sqrt(m) + tl.sqrt(n))


@triton.jit(do_not_specialize_on_alignment=["lr_ptr", "found_inf_ptr"])
def _descend_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    lr_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + DESCENT.m), size_at(job_ptr + DESCENT.n))
    totals_ptr = pointer_at(job_ptr + DESCENT.totals, scratch_ptr, tl.float32)
    total = sum_of(totals_ptr, size_at(job_ptr + DESCENT.totals_count), False, 1024)
    is_balanced = tl.load(job_ptr + DESCENT.factors) != 0
    elements = size[0].to(tl.float32) * tl.where(is_balanced, 1.0, size[1].to(tl.float32))
    lr = tl.load(lr_ptr).to(tl.float32)
    shared = lr * tl.load(scalars_ptr + SHAMPOO.update_rms) * _shape_scale(size)
    shared *= inverse_root(total / elements)
    decay = lr * tl.load(scalars_ptr + SHAMPOO.weight_decay)
    dtype = tl.load(job_ptr + DESCENT.dtype)
    column_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + DESCENT.member) + MEMBER.param
    if dtype == DTYPE.float32:
        single_ptr = pointer_at(column_ptr, scratch_ptr, tl.float32)
        _descend(
            job_ptr, scratch_ptr, single_ptr, size, shared, decay, tile, FACTOR, BLOCK_M, BLOCK_N
        )
    elif dtype == DTYPE.bfloat16:
        brain_ptr = pointer_at(column_ptr, scratch_ptr, tl.bfloat16)
        _descend(
            job_ptr, scratch_ptr, brain_ptr, size, shared, decay, tile, FACTOR, BLOCK_M, BLOCK_N
        )
    else:
        half_ptr = pointer_at(column_ptr, scratch_ptr, tl.float16)
        _descend(
            job_ptr, scratch_ptr, half_ptr, size, shared, decay, tile, FACTOR, BLOCK_M, BLOCK_N
        )
