"""The direction of root-free Shampoo and the descent, in Triton.

    directions   X_A N,  then  P = (X_A N) X_B;  sums of P's squares by row and by tile
    descend      P <- P / rms(P);   r_i = mean_j P_ij^2
                 v <- v + max(1 - row_beta, 1 / step) (r - v),   P_i <- P_i / sqrt(v_i + 0.1)
                 p <- (1 - lr weight_decay) p - lr rms P / rms(P),
                 rms = update_rms 2 sqrt(256 m / n) / (sqrt(m) + sqrt(n))

Where an axis is diagonal P is X N or N X alone, with its rows or columns times the squares of K.
N's largest magnitude is taken out in the first product, so that the squares of P stay in range.
Without row averages v is left out, and with it the second rms.

Shapes: N, P, p (m, n), v (m,). Dtypes: GEMM operands, X_A N and P bfloat16 or float32, accumulated
in float32 and rounded once, at the write; P float32 where both axes are diagonal; v float32; p
rounded once, at the write. FLOPs: 2 m n (m + n). Bytes an element of float32 parameters: 12, and
10 for the descent. A program works on one tile of one job, a row of `Direction` or `Descent`; in
the descent on `DESCENT_TILES` of them, for each has to read the row sums of its whole matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, skips
from .factors import sum_rows
from .gradients import inverse_root, largest_of
from .products import store_scaled
from .rootfree_shampoo_slots import DESCENT, DIRECTION, DTYPE, SHAMPOO
from .slots import LAYOUT, MEMBER
from .tiles import find_tile, padded, pointer_at, product_tile, size_at, spilled, sum_of, tile_of

# Added to the mean square of a row before it divides, as in the specification.
_ROW_DAMPING = tl.constexpr(0.1)
_REFERENCE_SIDE = tl.constexpr(256.0)


@triton.jit
def _averages_of(member_ptr):
    """v, a row of a stack, of which nothing promises 16 bytes."""
    return tl.load(member_ptr + MEMBER.averages).to(tl.pointer_type(tl.float32))


@triton.jit
def _store_direction(
    job_ptr, scratch_ptr, acc, size, tile, pointers, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns the tile's sum of squares."""
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    out_ptr = pointer_at(job_ptr + DIRECTION.output, scratch_ptr, WIDE)
    if acc is not None:
        sums = store_scaled(pointers, out_ptr, acc * scale, size, tile, True)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        for i in range(BLOCK // ROWS):
            part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
            rows = spilled(out_ptr, size, part, ROWS, BLOCK) * scale
            sums += store_scaled(pointers, out_ptr, rows, size, part, True)
    return tl.sum(sums, 0)


@triton.jit
def _directions_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    m, n = (size_at(job_ptr + DIRECTION.m), size_at(job_ptr + DIRECTION.n))
    k = size_at(job_ptr + DIRECTION.k)
    scale = 1.0
    if tl.load(job_ptr + DIRECTION.largest) != 0:
        largest_ptr = pointer_at(job_ptr + DIRECTION.largest, scratch_ptr, tl.float32)
        scale = 1.0 / largest_of(largest_ptr, tl.cdiv(m, BLOCK) * tl.cdiv(n, BLOCK))
    pointers = (
        pointer_at(job_ptr + DIRECTION.row_scales, scratch_ptr, tl.float32),
        pointer_at(job_ptr + DIRECTION.column_scales, scratch_ptr, tl.float32),
        pointer_at(job_ptr + DIRECTION.row_sums, scratch_ptr, tl.float32),
    )
    if k > 0:
        a = (pointer_at(job_ptr + DIRECTION.a, scratch_ptr, FACTOR), k)
        b = (pointer_at(job_ptr + DIRECTION.b, scratch_ptr, FACTOR), n)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        acc = product_tile(a, b, acc, (m, n, k), tile, False, False, BLOCK_K, PRECISION)
        squares = _store_direction(
            job_ptr, scratch_ptr, acc, (m, n), tile, pointers, scale, FACTOR, BLOCK
        )
    else:  # both axes are diagonal
        squares = _store_direction(
            job_ptr, scratch_ptr, None, (m, n), tile, pointers, scale, tl.float32, BLOCK
        )
    if tl.load(job_ptr + DIRECTION.tile_sums) != 0:
        sums_ptr = pointer_at(job_ptr + DIRECTION.tile_sums, scratch_ptr, tl.float32)
        tl.store(sums_ptr + index, squares)
    # The descent writes v a few rows a program, and each program reads all of it.
    if (tl.load(job_ptr + DIRECTION.averages) != 0) & (tile[1] == 0):
        member_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + DIRECTION.member)
        source_ptr = _averages_of(member_ptr)
        target_ptr = pointer_at(job_ptr + DIRECTION.averages, scratch_ptr, tl.float32)
        offs = tile[0] * BLOCK + tl.arange(0, BLOCK)
        tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=offs < m), mask=offs < m)


@triton.jit
def _new_averages(sums_ptr, old_ptr, m, count, inverse_mean, change, block, BLOCK: tl.constexpr):
    """r and v of a block of rows."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    r = sum_rows(sums_ptr, m, count, block, BLOCK) * inverse_mean
    v = tl.load(old_ptr + offs, mask=offs < m, other=0.0)
    return r, decayed(v, r, 1.0 - change, change)


@triton.jit
def _row_factors(
    job_ptr,
    scratch_ptr,
    member_ptr,
    size,
    change,
    inverse,
    tile,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What P is multiplied by to have an rms of 1, by rows; v of these rows is stored."""
    m, n = size
    sums_ptr = pointer_at(job_ptr + DESCENT.row_sums, scratch_ptr, tl.float32)
    count = size_at(job_ptr + DESCENT.row_sums_count)
    old_ptr = pointer_at(job_ptr + DESCENT.averages, scratch_ptr, tl.float32)
    inverse_mean = inverse * inverse / n
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.cdiv(m, BLOCK)):
        r, v = _new_averages(sums_ptr, old_ptr, m, count, inverse_mean, change, block, BLOCK)
        total += r / (v + _ROW_DAMPING)
    again = inverse_root(tl.sum(total, 0) / m)
    offs = tile[0] * BLOCK_M + tl.arange(0, BLOCK_M)
    _, v = _new_averages(sums_ptr, old_ptr, m, count, inverse_mean, change, tile[0], BLOCK_M)
    if tile[1] == 0:
        tl.store(_averages_of(member_ptr) + offs, v, mask=offs < m)
    return inverse * (again / tl.sqrt(v + _ROW_DAMPING))


@triton.jit
def _descend_tile(p_ptr, stride, direction_ptr, size, factors, decay, part, BLOCK_M, BLOCK_N):
    m, n = size
    direction_ptrs, within = tile_of(
        direction_ptr, padded(n), (m, padded(n)), part, BLOCK_M, BLOCK_N
    )
    u = tl.load(direction_ptrs, mask=within, other=0.0).to(tl.float32)
    ptrs, mask = tile_of(p_ptr, stride, (m, stride), part, BLOCK_M, BLOCK_N)
    p = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    p = p - decay * p - factors[:, None] * u
    tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _descend_param(
    job_ptr, scratch_ptr, p_ptr, size, factors, decay, tile, DIRECTION_DTYPE,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = size[1]
    direction_ptr = pointer_at(job_ptr + DESCENT.direction, scratch_ptr, DIRECTION_DTYPE)
    for i in range(tl.minimum(TILES, tl.cdiv(n, BLOCK_N) - tile[1] * TILES)):
        part = (tile[0], tile[1] * TILES + i)
        if n % LAYOUT.row_multiple == 0:
            _descend_tile(
                p_ptr, padded(n), direction_ptr, size, factors, decay, part, BLOCK_M, BLOCK_N
            )
        else:
            _descend_tile(p_ptr, n, direction_ptr, size, factors, decay, part, BLOCK_M, BLOCK_N)


@triton.jit
def _descend(
    job_ptr, scratch_ptr, p_ptr, size, factors, decay, tile, FACTOR,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if tl.load(job_ptr + DESCENT.wide) != 0:
        _descend_param(
            job_ptr, scratch_ptr, p_ptr, size, factors, decay, tile, tl.float32,
            TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _descend_param(
            job_ptr, scratch_ptr, p_ptr, size, factors, decay, tile, FACTOR,
            TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _shape_scale(size):
    """RMS of the update of an (m, n) matrix in units of that of a 256 x 256 one."""
    m, n = size[0].to(tl.float32), size[1].to(tl.float32)
    return tl.sqrt(m / n * _REFERENCE_SIDE) * 2.0 / (tl.sqrt(m) + tl.sqrt(n))


@triton.jit(do_not_specialize_on_alignment=["steps_ptr", "lr_ptr", "found_inf_ptr"])
def _descend_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    steps_ptr,
    lr_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + DESCENT.m), size_at(job_ptr + DESCENT.n))
    member = tl.load(job_ptr + DESCENT.member)
    member_ptr = members_ptr + len(MEMBER) * member
    sums_ptr = pointer_at(job_ptr + DESCENT.tile_sums, scratch_ptr, tl.float32)
    total = sum_of(sums_ptr, size_at(job_ptr + DESCENT.tile_sums_count), False, 1024)
    inverse = inverse_root(total / (size[0].to(tl.float32) * size[1].to(tl.float32)))
    factors = tl.full([BLOCK_M], 1.0, tl.float32) * inverse
    if tl.load(job_ptr + DESCENT.averages) != 0:
        one_minus_row_beta = tl.load(scalars_ptr + SHAMPOO.one_minus_row_beta)
        change = tl.maximum(one_minus_row_beta, 1.0 / tl.load(steps_ptr + member))
        factors = _row_factors(
            job_ptr, scratch_ptr, member_ptr, size, change, inverse, tile, BLOCK_M, 256
        )
    lr = tl.load(lr_ptr).to(tl.float32)
    factors *= lr * tl.load(scalars_ptr + SHAMPOO.update_rms) * _shape_scale(size)
    decay = lr * tl.load(scalars_ptr + SHAMPOO.weight_decay)
    dtype = tl.load(job_ptr + DESCENT.dtype)
    column_ptr = member_ptr + MEMBER.param
    if dtype == DTYPE.float32:
        single_ptr = pointer_at(column_ptr, scratch_ptr, tl.float32)
        _descend(
            job_ptr, scratch_ptr, single_ptr, size, factors, decay, tile, FACTOR,
            TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif dtype == DTYPE.bfloat16:
        brain_ptr = pointer_at(column_ptr, scratch_ptr, tl.bfloat16)
        _descend(
            job_ptr, scratch_ptr, brain_ptr, size, factors, decay, tile, FACTOR,
            TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        half_ptr = pointer_at(column_ptr, scratch_ptr, tl.float16)
        _descend(
            job_ptr, scratch_ptr, half_ptr, size, factors, decay, tile, FACTOR,
            TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
