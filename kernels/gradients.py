"""What root-free Shampoo makes of a gradient, in Triton: its scale, Y and Z, the momentum.

    scale        G -> GEMM dtype as it is; partial maxima and sums of squares, of which
                 `scale_of` has 1 / rms(G);  K that no GEMM can read -> copies
    transform    Y = G K_B / rms(G),   Z = K_A^T G / rms(G)
                 M <- beta1 M + (1 - beta1) G / rms(G),   N = beta1 M + (1 - beta1) G / rms(G)

Shapes: G, Y, Z, M, N (m, n), K (d, d) or a diagonal (d,). Dtypes: G in GEMM operands' dtype,
bfloat16 or float32, in float32 where both axes are diagonal; so Y, Z and N, accumulated in float32
and rounded once, at the write; M float32. bfloat16 has float32's range: only a sum of squares has
to have the largest entry taken out first. FLOPs: 2 m n (m + n). Bytes an element of a float32
gradient: 6, and 12 for M and N, beside the operands of products.

A program works on one tile of one job, a row of `Scale` or `Transform`. Sums are of numbers a tile,
in one fixed order. Where a K is diagonal, Y or Z is G with its columns or rows scaled; where S is,
sums of squares of its rows or columns are all that is kept of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, inverse_of, skips
from .products import copy_tile, store_column_sums, store_scaled
from .rootfree_shampoo_slots import DTYPE, ROLE, SCALE, SHAMPOO, TRANSFORM
from .slots import LAYOUT, MEMBER
from .tiles import find_tile, padded, pointer_at, product_tile, size_at, spilled, tile_of

# The smallest normal number: what the largest entry is taken for where it is smaller.
_TINY = tl.constexpr(2.0**-126)
# Numbers that are read at a time, of one for each of a few thousand tiles.
_WIDTH = tl.constexpr(1024)


@triton.jit
def largest_of(ptr, count):
    """The largest of numbers that are not negative, at least `_TINY`."""
    WIDTH: tl.constexpr = _WIDTH
    offs = tl.arange(0, WIDTH)
    largest = tl.zeros([WIDTH], tl.float32)
    for done in range(0, count, WIDTH):
        largest = tl.maximum(
            largest, tl.load(ptr + done + offs, mask=offs < count - done, other=0.0)
        )
    return tl.maximum(tl.max(largest, 0), _TINY)


@triton.jit
def scale_of(ptr, count, elements):
    """1 / max|G| and max|G| / rms(G), 0 for a G of zeros; their product may be out of range.

    ptr: the largest magnitude of each tile, and after them the sums of squares of what a tile is
    when that is taken out. One that is NaN makes the second number NaN.
    """
    WIDTH: tl.constexpr = _WIDTH
    largest = largest_of(ptr, count)
    offs = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for done in range(0, count, WIDTH):
        mask = offs < count - done
        ratio = tl.maximum(tl.load(ptr + done + offs, mask=mask, other=0.0), _TINY) / largest
        total += ratio * ratio * tl.load(ptr + count + done + offs, mask=mask, other=0.0)
    return 1.0 / largest, inverse_root(tl.sum(total, 0) / elements)


@triton.jit
def inverse_root(square):
    """The inverse of a root mean square; 0 for 0, so that a matrix of zeros stays one."""
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(square))


@triton.jit
def _scale_rows(ptr, stride, target_ptr, size, stats_ptr, count, unscale, tile, BLOCK_M, BLOCK_N):
    """Copy a tile of rows `stride` apart into padded ones, and store its statistics."""
    ptrs, mask = tile_of(ptr, stride, (size[0], stride), tile, BLOCK_M, BLOCK_N)
    value = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if unscale is not None:
        value *= unscale
    target = padded(size[1])
    ptrs, mask = tile_of(target_ptr, target, (size[0], target), tile, BLOCK_M, BLOCK_N)
    tl.store(ptrs, value.to(target_ptr.dtype.element_ty), mask=mask)
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    value /= tl.maximum(largest, _TINY)
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + count, tl.sum(tl.sum(value * value, 1), 0))


@triton.jit
def _scale_tile(
    job_ptr, scratch_ptr, grad_ptr, size, unscale, tile, index, TARGET, BLOCK_M, BLOCK_N
):
    target_ptr = pointer_at(job_ptr + SCALE.target, scratch_ptr, TARGET)
    stats_ptr = pointer_at(job_ptr + SCALE.stats, scratch_ptr, tl.float32) + index
    count = size_at(job_ptr + SCALE.stats_count)
    if size[1] % LAYOUT.row_multiple == 0:
        stride = padded(size[1])
        _scale_rows(
            grad_ptr, stride, target_ptr, size, stats_ptr, count, unscale, tile, BLOCK_M, BLOCK_N
        )
    else:
        _scale_rows(
            grad_ptr, size[1], target_ptr, size, stats_ptr, count, unscale, tile, BLOCK_M, BLOCK_N
        )


@triton.jit
def _scale_gradient(
    job_ptr, scratch_ptr, grad_ptr, size, unscale, tile, index, FACTOR, BLOCK_M, BLOCK_N
):
    if tl.load(job_ptr + SCALE.wide) != 0:
        _scale_tile(
            job_ptr, scratch_ptr, grad_ptr, size, unscale, tile, index, tl.float32, BLOCK_M, BLOCK_N
        )
    else:
        _scale_tile(
            job_ptr, scratch_ptr, grad_ptr, size, unscale, tile, index, FACTOR, BLOCK_M, BLOCK_N
        )


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr"])
def _scale_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    grad_scale_ptr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + SCALE.rows), size_at(job_ptr + SCALE.columns))
    source = tl.load(job_ptr + SCALE.source)
    if tl.load(job_ptr + SCALE.stats) == 0:
        source_ptr = pointer_at(job_ptr + SCALE.source, scratch_ptr, FACTOR)
        target_ptr = pointer_at(job_ptr + SCALE.target, scratch_ptr, FACTOR)
        nowhere_ptr = pointer_at(job_ptr + SCALE.stats, scratch_ptr, tl.float32)
        aligned = size[1] % LAYOUT.row_multiple == 0
        copy_tile(
            source_ptr, aligned, target_ptr, size, nowhere_ptr, False, None, tile, BLOCK_M, BLOCK_N
        )
    else:
        unscale = inverse_of(grad_scale_ptr)
        column_ptr = members_ptr + len(MEMBER) * source + MEMBER.grad
        dtype = tl.load(job_ptr + SCALE.dtype)
        if dtype == DTYPE.float32:
            single_ptr = pointer_at(column_ptr, scratch_ptr, tl.float32)
            _scale_gradient(
                job_ptr,
                scratch_ptr,
                single_ptr,
                size,
                unscale,
                tile,
                index,
                FACTOR,
                BLOCK_M,
                BLOCK_N,
            )
        elif dtype == DTYPE.bfloat16:
            brain_ptr = pointer_at(column_ptr, scratch_ptr, tl.bfloat16)
            _scale_gradient(
                job_ptr,
                scratch_ptr,
                brain_ptr,
                size,
                unscale,
                tile,
                index,
                FACTOR,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            half_ptr = pointer_at(column_ptr, scratch_ptr, tl.float16)
            _scale_gradient(
                job_ptr, scratch_ptr, half_ptr, size, unscale, tile, index, FACTOR, BLOCK_M, BLOCK_N
            )


@triton.jit
def _momentum_part(g_ptr, buf_ptr, out_ptr, stride, size, scale, scalars_ptr, part, ROWS, BLOCK):
    """M and N of a part of a tile; returns the largest magnitudes of N by columns."""
    m, n = size
    even = padded(n)
    g_ptrs, mask = tile_of(g_ptr, even, (m, even), part, ROWS, BLOCK)
    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * scale[0] * scale[1]
    g *= tl.load(scalars_ptr + SHAMPOO.sign)
    buf_ptrs, within = tile_of(buf_ptr, stride, (m, stride), part, ROWS, BLOCK)
    buf = tl.load(buf_ptrs, mask=within, other=0.0)
    beta1 = tl.load(scalars_ptr + SHAMPOO.beta1)
    one_minus_beta1 = tl.load(scalars_ptr + SHAMPOO.one_minus_beta1)
    buf = decayed(buf, g, beta1, one_minus_beta1)
    tl.store(buf_ptrs, buf, mask=within)
    ahead = beta1 * buf + one_minus_beta1 * g
    out_ptrs, _ = tile_of(out_ptr, even, (m, even), part, ROWS, BLOCK)
    tl.store(out_ptrs, ahead.to(out_ptr.dtype.element_ty), mask=mask)
    return tl.max(tl.abs(ahead), 0)


@triton.jit
def _momentum_tile(
    job_ptr, scratch_ptr, buf_ptr, size, scale, scalars_ptr, tile, WIDE: tl.constexpr, BLOCK
):
    """Returns the largest magnitude of N."""
    n = size[1]
    g_ptr = pointer_at(job_ptr + TRANSFORM.gradient, scratch_ptr, WIDE)
    out_ptr = pointer_at(job_ptr + TRANSFORM.output, scratch_ptr, WIDE)
    if n % LAYOUT.row_multiple == 0:
        largest = _momentum_parts(
            g_ptr, buf_ptr, out_ptr, padded(n), size, scale, scalars_ptr, tile, BLOCK // 4, BLOCK
        )
    else:  # every element has an address of its own: fewer at a time
        largest = _momentum_parts(
            g_ptr, buf_ptr, out_ptr, n, size, scale, scalars_ptr, tile, LAYOUT.spilled_rows, BLOCK
        )
    return largest


@triton.jit
def _momentum_parts(
    g_ptr, buf_ptr, out_ptr, stride, size, scale, scalars_ptr, tile,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    largest = tl.zeros([BLOCK], tl.float32)
    for i in range(BLOCK // ROWS):
        part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
        found = _momentum_part(
            g_ptr, buf_ptr, out_ptr, stride, size, scale, scalars_ptr, part, ROWS, BLOCK
        )
        largest = tl.maximum(largest, found)
    return tl.max(largest, 0)


@triton.jit
def _store_transformed(job_ptr, scratch_ptr, acc, size, scale, tile, FACTOR: tl.constexpr):
    out_ptr = pointer_at(job_ptr + TRANSFORM.output, scratch_ptr, FACTOR)
    pointers = _scaled_by(job_ptr, scratch_ptr)
    sums = store_scaled(pointers, out_ptr, acc * scale[0] * scale[1], size, tile, False)
    sums_ptr = pointer_at(job_ptr + TRANSFORM.column_sums, scratch_ptr, tl.float32)
    store_column_sums(sums_ptr, sums, size[1], tile)


@triton.jit
def _scaled_by(job_ptr, scratch_ptr):
    return (
        pointer_at(job_ptr + TRANSFORM.row_scales, scratch_ptr, tl.float32),
        pointer_at(job_ptr + TRANSFORM.column_scales, scratch_ptr, tl.float32),
        pointer_at(job_ptr + TRANSFORM.row_sums, scratch_ptr, tl.float32),
    )


@triton.jit
def _scaled_tile(job_ptr, scratch_ptr, size, scale, tile, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """G with rows or columns scaled, a few rows at a time."""
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    g_ptr = pointer_at(job_ptr + TRANSFORM.gradient, scratch_ptr, WIDE)
    out_ptr = pointer_at(job_ptr + TRANSFORM.output, scratch_ptr, WIDE)
    pointers = _scaled_by(job_ptr, scratch_ptr)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(BLOCK // ROWS):
        part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
        rows = spilled(g_ptr, size, part, ROWS, BLOCK).to(tl.float32) * scale[0] * scale[1]
        sums += store_scaled(pointers, out_ptr, rows, size, part, False)
    sums_ptr = pointer_at(job_ptr + TRANSFORM.column_sums, scratch_ptr, tl.float32)
    store_column_sums(sums_ptr, sums, size[1], tile)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _transform_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    m, n = (size_at(job_ptr + TRANSFORM.m), size_at(job_ptr + TRANSFORM.n))
    stats_ptr = pointer_at(job_ptr + TRANSFORM.stats, scratch_ptr, tl.float32)
    elements = m.to(tl.float32) * n.to(tl.float32)
    scale = scale_of(stats_ptr, size_at(job_ptr + TRANSFORM.stats_count), elements)
    role, wide = tl.load(job_ptr + TRANSFORM.role), tl.load(job_ptr + TRANSFORM.wide) != 0
    if role == ROLE.momentum:
        member_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + TRANSFORM.member)
        buf_ptr = pointer_at(member_ptr + MEMBER.buffer, scratch_ptr, tl.float32)
        if wide:
            largest = _momentum_tile(
                job_ptr, scratch_ptr, buf_ptr, (m, n), scale, scalars_ptr, tile, tl.float32, BLOCK
            )
        else:
            largest = _momentum_tile(
                job_ptr, scratch_ptr, buf_ptr, (m, n), scale, scalars_ptr, tile, FACTOR, BLOCK
            )
        largest_ptr = pointer_at(job_ptr + TRANSFORM.largest, scratch_ptr, tl.float32)
        tl.store(largest_ptr + index, largest)
        if index == 0:
            tiles = tl.cdiv(m, BLOCK) * tl.cdiv(n, BLOCK)
            tl.store(largest_ptr + tiles, tl.where(scale[1] == 0, 0.0, 1.0))
    elif role == ROLE.scaled:
        if wide:
            _scaled_tile(job_ptr, scratch_ptr, (m, n), scale, tile, tl.float32, BLOCK)
        else:
            _scaled_tile(job_ptr, scratch_ptr, (m, n), scale, tile, FACTOR, BLOCK)
    else:
        g = (pointer_at(job_ptr + TRANSFORM.gradient, scratch_ptr, FACTOR), n)
        k_ptr = pointer_at(job_ptr + TRANSFORM.factor, scratch_ptr, FACTOR)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        if role == ROLE.right:
            k = (k_ptr, n)
            acc = product_tile(g, k, acc, (m, n, n), tile, False, False, BLOCK_K, PRECISION)
        else:
            k = (k_ptr, m)
            acc = product_tile(k, g, acc, (m, n, m), tile, True, False, BLOCK_K, PRECISION)
        _store_transformed(job_ptr, scratch_ptr, acc, (m, n), scale, tile, FACTOR)
