"""What root-free Shampoo makes of a gradient, in Triton: its scale, the momentum, Y and Z.

    scale        partial maxima and sums of squares of G, of which `scale_of` has 1 / rms(G);
                 K that no GEMM can read -> copies
    momentum     G / rms(G) -> GEMM dtype
                 M <- beta1 M + (1 - beta1) G / rms(G),   N = beta1 M + (1 - beta1) G / rms(G)
    transform    Y = G K_B,   Z = K_A^T G, of that G

Shapes: G, Y, Z, M, N (m, n), K (d, d) or a diagonal (d,). Dtypes: G float32, bfloat16 or float16,
computed with in float32; GEMM operands, Y, Z and N bfloat16 or float32, accumulated in float32 and
rounded once, at the write; N float32 where both axes are diagonal; M float32. FLOPs: 2 m n (m + n).
Bytes an element of a float32 gradient: 4, and 16 for the momentum's launch.

A program works on one tile of one job, a row of `Scale`, `Momentum` or `Transform`. Sums are of
numbers a tile, in one fixed order. Where a K is diagonal, Y or Z is G with its columns or rows
scaled, which the momentum's launch does; where S is, sums of squares of its rows or columns are all
that is kept of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import decayed, inverse_of, skips
from .products import copy_tile, store_column_sums, store_scaled, store_summed
from .rootfree_shampoo_slots import DTYPE, MOMENTUM, SCALE, SHAMPOO, TRANSFORM
from .slots import LAYOUT, MEMBER, SIDE
from .tiles import (
    find_tile,
    padded,
    pointer_at,
    pointer_to,
    product_tile,
    ragged_pointer_at,
    size_at,
    tile_of,
)

# The smallest normal number: what the largest entry is taken for where it is smaller.
_TINY = tl.constexpr(2.0**-126)
# Numbers that are read at a time, of one for each of a few thousand tiles.
_WIDTH = tl.constexpr(1024)
# Rows of a tile that an elementwise launch works on at a time.
PART_ROWS = tl.constexpr(8)


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
def _gradient_part(
    address, dtype, stride, size, unscale, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A part of a gradient in any dtype, in float32."""
    shape = (size[0], stride)
    if dtype == DTYPE.float32:
        single_ptrs, mask = tile_of(
            pointer_to(address, tl.float32), stride, shape, part, ROWS, COLUMNS
        )
        g = tl.load(single_ptrs, mask=mask, other=0.0)
    elif dtype == DTYPE.bfloat16:
        brain_ptrs, mask = tile_of(
            pointer_to(address, tl.bfloat16), stride, shape, part, ROWS, COLUMNS
        )
        g = tl.load(brain_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        half_ptrs, mask = tile_of(
            pointer_to(address, tl.float16), stride, shape, part, ROWS, COLUMNS
        )
        g = tl.load(half_ptrs, mask=mask, other=0.0).to(tl.float32)
    if unscale is not None:
        g *= unscale
    return g


@triton.jit
def _scale_tile(
    job_ptr, scratch_ptr, address, stride, size, unscale, tile, index, BLOCK_M, BLOCK_N
):
    """Store a tile's statistics."""
    dtype = tl.load(job_ptr + SCALE.dtype)
    g = _gradient_part(address, dtype, stride, size, unscale, tile, BLOCK_M, BLOCK_N)
    largest = tl.max(tl.max(tl.abs(g), 1), 0)
    g /= tl.maximum(largest, _TINY)
    stats_ptr = pointer_at(job_ptr + SCALE.stats, scratch_ptr, tl.float32) + index
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + size_at(job_ptr + SCALE.stats_count), tl.sum(tl.sum(g * g, 1), 0))


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
    if tl.load(job_ptr + SCALE.stats) == 0:
        source_ptr = ragged_pointer_at(job_ptr + SCALE.source, scratch_ptr, FACTOR)
        target_ptr = pointer_at(job_ptr + SCALE.target, scratch_ptr, FACTOR)
        nowhere_ptr = pointer_at(job_ptr + SCALE.stats, scratch_ptr, tl.float32)
        copy_tile(
            source_ptr, False, target_ptr, size, size, nowhere_ptr, False, None, tile,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        unscale = inverse_of(grad_scale_ptr)
        member = tl.load(job_ptr + SCALE.source)
        address = tl.load(members_ptr + len(MEMBER) * member + MEMBER.grad)
        if size[1] % LAYOUT.row_multiple == 0:
            stride = padded(size[1])
            _scale_tile(
                job_ptr, scratch_ptr, address, stride, size, unscale, tile, index,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            _scale_tile(
                job_ptr, scratch_ptr, address, size[1], size, unscale, tile, index,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _store_part(ptr, value, target, part):
    """Into padded rows; nowhere where the pointer is null."""
    if ptr.to(tl.int64) != 0:
        stride = padded(target[1])
        even = (target[0], stride)
        ptrs, mask = tile_of(ptr, stride, even, part, value.shape[0], value.shape[1])
        tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _momentum_operands(job_ptr, scratch_ptr, member_ptr, FACTOR: tl.constexpr):
    """Where G, M, G / rms(G), N and a wide N lie, and the dtype of G.

    All is looked up at once, and before a loop, which would wait for it at every turn.
    """
    return (
        tl.load(member_ptr + MEMBER.grad),
        pointer_at(member_ptr + MEMBER.buffer, scratch_ptr, tl.float32),
        pointer_at(job_ptr + MOMENTUM.gradient, scratch_ptr, FACTOR),
        pointer_at(job_ptr + MOMENTUM.ahead, scratch_ptr, FACTOR),
        pointer_at(job_ptr + MOMENTUM.wide, scratch_ptr, tl.float32),
        tl.load(job_ptr + MOMENTUM.dtype),
    )


@triton.jit
def _momentum_parts(
    job_ptr, scratch_ptr, operands, stride, size, target, scale, unscale, scalars_ptr, tile, index,
    ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """M and N."""
    address, buf_ptr, gradient_ptr, ahead_ptr, wide_ptr, dtype = operands
    sign = tl.load(scalars_ptr + SHAMPOO.sign)
    beta1 = tl.load(scalars_ptr + SHAMPOO.beta1)
    one_minus_beta1 = tl.load(scalars_ptr + SHAMPOO.one_minus_beta1)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(PARTS):
        part = (tile[0] * PARTS + i, tile[1])
        buf_ptrs, mask = tile_of(buf_ptr, stride, (size[0], stride), part, ROWS, COLUMNS)
        buf = tl.load(buf_ptrs, mask=mask, other=0.0)
        g = _gradient_part(address, dtype, stride, size, unscale, part, ROWS, COLUMNS)
        g = g * scale[0] * scale[1]
        _store_part(gradient_ptr, g, target, part)
        g *= sign
        buf = decayed(buf, g, beta1, one_minus_beta1)
        tl.store(buf_ptrs, buf, mask=mask)
        n = beta1 * buf + one_minus_beta1 * g
        _store_part(ahead_ptr, n, target, part)
        _store_part(wide_ptr, n, target, part)
        largest = tl.maximum(largest, tl.abs(n))
    largest_ptr = pointer_at(job_ptr + MOMENTUM.largest, scratch_ptr, tl.float32)
    tl.store(largest_ptr + index, tl.max(tl.max(largest, 1), 0))
    if index == 0:
        count = size_at(job_ptr + MOMENTUM.stats_count)
        tl.store(largest_ptr + count, tl.where(scale[1] == 0, 0.0, 1.0))


@triton.jit
def _scaled_parts(
    job_ptr, scratch_ptr, operands, stride, size, target, scale, unscale, tile,
    ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y or Z, G times a diagonal K."""
    address, _, _, out_ptr, _, dtype = operands
    pointers = (
        ragged_pointer_at(job_ptr + MOMENTUM.row_scales, scratch_ptr, tl.float32),
        ragged_pointer_at(job_ptr + MOMENTUM.column_scales, scratch_ptr, tl.float32),
        pointer_at(job_ptr + MOMENTUM.row_sums, scratch_ptr, tl.float32),
    )
    sums = tl.zeros([COLUMNS], tl.float32)
    for i in range(PARTS):
        part = (tile[0] * PARTS + i, tile[1])
        g = _gradient_part(address, dtype, stride, size, unscale, part, ROWS, COLUMNS)
        g = g * scale[0] * scale[1]
        sums += store_scaled(pointers, out_ptr, target[1], g, target, part, False)
    sums_ptr = pointer_at(job_ptr + MOMENTUM.column_sums, scratch_ptr, tl.float32)
    store_column_sums(sums_ptr, sums, size[1], tile)


@triton.jit
def _momentum_tile(
    job_ptr, scratch_ptr, operands, stride, size, target, scale, unscale, scalars_ptr, tile, index,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_M // PART_ROWS
    if tl.load(job_ptr + MOMENTUM.largest) != 0:
        _momentum_parts(
            job_ptr, scratch_ptr, operands, stride, size, target, scale, unscale, scalars_ptr,
            tile, index, PART_ROWS, PARTS, BLOCK_N,
        )  # fmt: skip
    else:
        _scaled_parts(
            job_ptr, scratch_ptr, operands, stride, size, target, scale, unscale, tile,
            PART_ROWS, PARTS, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"])
def _momentum_kernel(
    tiles_ptr,
    jobs_ptr,
    scratch_ptr,
    members_ptr,
    scalars_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    job_ptr, tile, index = find_tile(tiles_ptr, jobs_ptr)
    size = (size_at(job_ptr + MOMENTUM.m), size_at(job_ptr + MOMENTUM.n))
    target = (size_at(job_ptr + MOMENTUM.target_rows), size_at(job_ptr + MOMENTUM.target_columns))
    unscale = inverse_of(grad_scale_ptr)
    member_ptr = members_ptr + len(MEMBER) * tl.load(job_ptr + MOMENTUM.member)
    operands = _momentum_operands(job_ptr, scratch_ptr, member_ptr, FACTOR)
    stats_ptr = pointer_at(job_ptr + MOMENTUM.stats, scratch_ptr, tl.float32)
    elements = size[0].to(tl.float32) * size[1].to(tl.float32)
    scale = scale_of(stats_ptr, size_at(job_ptr + MOMENTUM.stats_count), elements)
    if size[1] % LAYOUT.row_multiple == 0:
        _momentum_tile(
            job_ptr, scratch_ptr, operands, padded(size[1]), size, target, scale, unscale,
            scalars_ptr, tile, index, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _momentum_tile(
            job_ptr, scratch_ptr, operands, size[1], size, target, scale, unscale,
            scalars_ptr, tile, index, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr"])
def _transform_kernel(
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
    job_ptr, tile, _ = find_tile(tiles_ptr, jobs_ptr)
    m, n = (size_at(job_ptr + TRANSFORM.m), size_at(job_ptr + TRANSFORM.n))
    columns = size_at(job_ptr + TRANSFORM.columns)
    g = (pointer_at(job_ptr + TRANSFORM.gradient, scratch_ptr, FACTOR), columns)
    k_ptr = pointer_at(job_ptr + TRANSFORM.factor, scratch_ptr, FACTOR)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if tl.load(job_ptr + TRANSFORM.side) == SIDE.columns:
        acc = product_tile(g, (k_ptr, n), acc, (m, n, n), tile, False, False, BLOCK_K, PRECISION)
    else:
        acc = product_tile((k_ptr, m), g, acc, (m, n, m), tile, True, False, BLOCK_K, PRECISION)
    out_ptr = pointer_at(job_ptr + TRANSFORM.output, scratch_ptr, FACTOR)
    row_sums_ptr = ragged_pointer_at(job_ptr + TRANSFORM.row_sums, scratch_ptr, tl.float32)
    sums = store_summed(out_ptr, columns, row_sums_ptr, acc, (m, n), tile)
    sums_ptr = ragged_pointer_at(job_ptr + TRANSFORM.column_sums, scratch_ptr, tl.float32)
    store_column_sums(sums_ptr, sums, n, tile)
