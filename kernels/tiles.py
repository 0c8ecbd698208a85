"""Tiles of many matrices in one launch: where a program's tile lies, and products of tiles.

Jobs are rows of a device table, each a matrix that a launch computes; tiles are rows of another,
one a program. Their columns are in kernels/slots.py; kernels/matrix_jobs.py writes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .slots import LAYOUT, TILE


@triton.jit
def find_tile(tiles_ptr, jobs_ptr):
    """This program's tile: `tile_at`."""
    return tile_at(tiles_ptr, jobs_ptr, tl.program_id(0).to(tl.int64))


@triton.jit
def tile_at(tiles_ptr, jobs_ptr, index):
    """A tile's job, its (row, column), and its index among its job's."""
    tile_ptr = tiles_ptr + len(TILE) * index
    job_ptr = jobs_ptr + tl.load(tile_ptr + TILE.job).to(tl.int64) * LAYOUT.job_columns
    tile = tl.load(tile_ptr + TILE.row), tl.load(tile_ptr + TILE.column)
    return job_ptr, tile, tl.load(tile_ptr + TILE.index)


@triton.jit
def pointer_at(column_ptr, scratch_ptr, DTYPE: tl.constexpr):
    """The pointer in a job's column, which is promised to start aligned.

    The promise is of the operation that makes a pointer, and holds wherever that one is used. So
    rows that may be ragged need a pointer of their own, by `ragged_pointer_at`.
    """
    return pointer_to(_address_at(column_ptr, scratch_ptr), DTYPE)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr):
    """The pointer of an address that is promised to start aligned, as `pointer_at`'s is."""
    ALIGNMENT: tl.constexpr = LAYOUT.alignment
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def ragged_pointer_at(column_ptr, scratch_ptr, DTYPE: tl.constexpr):
    """As `pointer_at`, of what may start anywhere: of ragged rows, or a diagonal factor's."""
    return _address_at(column_ptr, scratch_ptr).to(tl.pointer_type(DTYPE))


@triton.jit
def _address_at(column_ptr, scratch_ptr):
    """The address in a job's column, or -1 - the index of a byte in the scratch."""
    value = tl.load(column_ptr)
    return tl.where(value < 0, scratch_ptr.to(tl.int64) - 1 - value, value)


@triton.jit
def size_at(column_ptr):
    return tl.load(column_ptr).to(tl.int32)


@triton.jit
def padded(size):
    """The row length of a matrix in the scratch: `slots.padded` on the device."""
    return (size + (LAYOUT.row_multiple - 1)) // LAYOUT.row_multiple * LAYOUT.row_multiple


@triton.jit
def tile_of(ptr, stride, size, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers and mask of a tile of a row-major matrix; within a tile, offsets fit 32 bits."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    row, column = tile[0] * BLOCK_M, tile[1] * BLOCK_N
    ptr += row.to(tl.int64) * stride + column
    ptrs = ptr + (offs_m[:, None] * stride + offs_n[None, :])
    return ptrs, (offs_m[:, None] < size[0] - row) & (offs_n[None, :] < size[1] - column)


@triton.jit
def product_tile(
    a,
    b,
    acc,
    size,
    tile,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + a tile of A B, for A (m, k) and B (k, n), stored as (k, m) or (n, k) where transposed.

    a and b are a pointer and how many columns are stored; size is (m, n, k). Rows are padded with
    zeros (`padded`), and read to there: no mask may cut a vector.
    """
    m, n, k = size
    offs_m = tl.arange(0, acc.shape[0])
    offs_n = tl.arange(0, acc.shape[1])
    offs_k = tl.arange(0, BLOCK_K)
    row, column = tile[0] * acc.shape[0], tile[1] * acc.shape[1]
    a_stride, b_stride = padded(a[1]), padded(b[1])
    if TRANS_A:
        a_ptrs = a[0] + row + (offs_k[None, :] * a_stride + offs_m[:, None])
        mask_a, a_step, a_end = offs_m < padded(m) - row, BLOCK_K * a_stride, k
    else:
        a_ptrs = a[0] + row.to(tl.int64) * a_stride
        a_ptrs += offs_m[:, None] * a_stride + offs_k[None, :]
        mask_a, a_step, a_end = offs_m < m - row, BLOCK_K, padded(k)
    if TRANS_B:
        b_ptrs = b[0] + column.to(tl.int64) * b_stride
        b_ptrs += offs_n[None, :] * b_stride + offs_k[:, None]
        mask_b, b_step, b_end = offs_n < n - column, BLOCK_K, padded(k)
    else:
        b_ptrs = b[0] + column + (offs_k[:, None] * b_stride + offs_n[None, :])
        mask_b, b_step, b_end = offs_n < padded(n) - column, BLOCK_K * b_stride, k
    for done in range(0, k, BLOCK_K):
        within = mask_a[:, None] & (offs_k[None, :] < a_end - done)
        a_tile = tl.load(a_ptrs, mask=within, other=0.0)
        within = mask_b[None, :] & (offs_k[:, None] < b_end - done)
        b_tile = tl.load(b_ptrs, mask=within, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit
def quarters(acc):
    """A tile by quarters of its columns, so that an epilogue needs few registers."""
    left, right = _halves(acc)
    return _halves(left) + _halves(right)


@triton.jit
def _halves(acc):
    acc = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(acc, (0, 2, 1)))


@triton.jit
def spill(acc, ptr, size, tile):
    """Leave a tile in the scratch, whence `spilled` reads a few rows at a time.

    Where rows are not aligned, every element has an address of its own; a whole tile of them would
    cost the aligned path of the same kernel its registers.
    """
    ptrs, mask = tile_of(
        ptr, padded(size[1]), (size[0], padded(size[1])), tile, acc.shape[0], acc.shape[1]
    )
    tl.store(ptrs, acc, mask=mask)
    tl.debug_barrier()


@triton.jit
def spilled(ptr, size, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ptrs, mask = tile_of(ptr, padded(size[1]), (size[0], padded(size[1])), tile, ROWS, BLOCK)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def sum_of(ptr, count, square, BLOCK: tl.constexpr):
    """The sum of float32 numbers, or of their squares, in one fixed order."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for done in range(0, count, BLOCK):
        x = tl.load(ptr + done + offs, mask=offs < count - done, other=0.0)
        total += tl.where(square, x * x, x)
    return tl.sum(total, 0)


@triton.jit
def store_symmetric(ptr, d, stride, value, part, is_diagonal):
    """Store a part of a tile and its mirror image; a diagonal tile is its own."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    value = value.to(ptr.dtype.element_ty)
    ptrs, mask = tile_of(ptr, stride, (d, stride), part, ROWS, COLUMNS)
    tl.store(ptrs, value, mask=mask)
    if not is_diagonal:
        mirrored, within = tile_of(ptr, stride, (d, stride), (part[1], part[0]), COLUMNS, ROWS)
        tl.store(mirrored, tl.trans(value), mask=within)


@triton.jit
def store_symmetric_tile(ptr, d, value, tile):
    """Where rows are aligned."""
    parts = quarters(value)
    for i in tl.static_range(4):
        part = (tile[0], 4 * tile[1] + i)
        store_symmetric(ptr, d, padded(d), parts[i], part, tile[0] == tile[1])


@triton.jit
def mirror_lower(ptr, d, stride, tile, BLOCK: tl.constexpr):
    """Make a diagonal tile that this program has stored symmetric to the bit, by its lower half.

    Of a product that is so but for rounding: three TF32 products are added up in another order.
    """
    ROWS: tl.constexpr = LAYOUT.spilled_rows
    offs_n = tile[1] * BLOCK + tl.arange(0, BLOCK)
    tl.debug_barrier()
    for i in range(BLOCK // ROWS):
        part = (tile[0] * (BLOCK // ROWS) + i, tile[1])
        offs_m = part[0] * ROWS + tl.arange(0, ROWS)
        ptrs, mask = tile_of(ptr, stride, (d, d), part, ROWS, BLOCK)
        value = tl.trans(tl.load(ptrs, mask=mask, other=0.0))
        ptrs, mask = tile_of(ptr, stride, (d, d), (part[1], part[0]), BLOCK, ROWS)
        tl.store(ptrs, value, mask=mask & (offs_m[None, :] > offs_n[:, None]))


@triton.jit
def scales(ptr, size, pid, BLOCK: tl.constexpr):
    """A block of a diagonal factor; ones for a dense one, whose pointer is null."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(ptr.to(tl.int64) != 0, size, 0)
    return tl.load(ptr + offs, mask=offs < size, other=1.0)
