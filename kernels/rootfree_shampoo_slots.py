"""Names of what root-free Shampoo's kernels read from device tables, as kernels/slots.py has."""

from __future__ import annotations

from typing import NamedTuple

from .slots import Column, Names, columns


class ShampooScalars(NamedTuple):
    """What kernels/gradients.py, grams.py, roots.py and directions.py read."""

    lr: float  # 0 where it is read on the device
    sign: float  # of the gradient: -1 to ascend
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    damping: float
    weight_decay: float
    update_rms: float
    one_minus_row_beta: float


SHAMPOO = columns(ShampooScalars)


class _Dtype(NamedTuple):
    """Of parameters and gradients, which one launch may have of several."""

    float32: int = 0
    bfloat16: int = 1
    float16: int = 2


class _Damping(NamedTuple):
    """What a job of the damped launch computes."""

    product: int = 0  # T = (S + lam I) K
    root: int = 1  # K of a diagonal axis
    sum: int = 2  # S + lam I, for a product of stacks


DTYPE, DAMPING = map(Names, (_Dtype(), _Damping()))


class Scale(NamedTuple):
    """The statistics of a gradient, or a copy of a K or K K^T into padded rows.

    By `gradients._scale_kernel`.
    """

    source: Column  # index of the gradient's member; address of a K or K K^T
    target: Column  # address, of padded rows; of a gradient 0
    rows: Column  # elements
    columns: Column  # elements
    stats: Column  # address, as of `gradients.scale_of`; 0 for a K or K K^T
    stats_count: Column  # count
    dtype: Column  # name, of the gradient


class Momentum(NamedTuple):
    """M and N, or Y or Z beside a diagonal K, by `gradients._momentum_kernel`."""

    member: Column  # index
    m: Column  # elements
    n: Column  # elements
    target_rows: Column  # elements of what is stored, with zeros beyond m
    target_columns: Column  # elements, as target_rows
    dtype: Column  # name, of the gradient
    stats: Column  # address, as of `gradients.scale_of`
    stats_count: Column  # count
    gradient: Column  # address, of padded rows: G / rms(G), for GEMMs
    ahead: Column  # address, of padded rows: N; Y or Z
    wide: Column  # address, of padded rows: N in float32, where no GEMM reads it
    largest: Column  # address, of N's largest magnitude a tile; after them 1, or 0 where G is zero
    row_scales: Column  # address of the diagonal K of the rows
    column_scales: Column  # address
    row_sums: Column  # address, of the squares of a row's elements, a float32 a tile column
    column_sums: Column  # address, as row_sums


class Transform(NamedTuple):
    """Y or Z, by `gradients._transform_kernel`."""

    gradient: Column  # address, of padded rows
    factor: Column  # address, of padded rows: K
    output: Column  # address, of padded rows: Y or Z, where they are kept
    columns: Column  # elements, of rows of the gradient and of the output
    m: Column  # elements
    n: Column  # elements
    side: Column  # name, of the axis of K: columns of Y, rows of Z
    row_sums: Column  # address, as of the momentum's
    column_sums: Column  # address


class Gram(NamedTuple):
    """S, or a block of it, by `grams._grams_kernel`."""

    seen: Column  # address, of Y or Z; for a diagonal S of partial sums of their squares
    size: Column  # elements, d
    others: Column  # elements, e: the other axis
    columns: Column  # elements, of rows of Y or Z; for a diagonal S the count of partial sums
    side: Column  # name
    gram: Column  # address
    copy: Column  # address, of padded rows
    trace: Column  # address, of partial sums of the diagonal, a float32 a diagonal tile
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned
    nonzero: Column  # address, of 1, or 0 where G is zero


class Damped(NamedTuple):
    """T, K of a diagonal axis or S + lam I, by `roots._damped_kernel`."""

    damping: Column  # name, of what is computed
    gram: Column  # address, of padded rows; of the state but for T
    factor: Column  # address, of padded rows
    output: Column  # address, of padded rows: T; the copy of S that lam is added to
    size: Column  # elements, d
    axis: Column  # elements, of all blocks
    trace: Column  # address, as of grams, of all blocks
    trace_count: Column  # count
    nonzero: Column  # address


class Symmetric(NamedTuple):
    """E, by `roots._residuals_kernel`, and ||E^2||, by `roots._squares_kernel`."""

    a: Column  # address, of padded rows: K; E
    b: Column  # address, of padded rows: T; E
    output: Column  # address, of padded rows: E; 0
    size: Column  # elements, d
    lives: Column  # elements of them that are no padding
    norms: Column  # address, of partial sums of squares, a float32 a tile
    nonzero: Column  # address


class Root(NamedTuple):
    """The step of a dense K, by `roots._roots_kernel`."""

    operand: Column  # address, of padded rows: K before
    residual: Column  # address, of padded rows: E
    size: Column  # elements, d
    factor: Column  # address: K before
    target: Column  # address: K after, of rows as the factor's
    low: Column  # address: the residual of a bfloat16 K
    copy: Column  # address, of padded rows; not where the target's are
    norms: Column  # address, of partial ||E||^2
    squares: Column  # address, of partial ||E^2||^2
    norms_count: Column  # count, of each
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned
    nonzero: Column  # address


class Direction(NamedTuple):
    """X_A N, and P, by `directions._directions_kernel`.

    A k of 0 means that both axes are diagonal: A is N in float32, and P takes its place.
    """

    a: Column  # address, of padded rows
    a_columns: Column  # elements
    b: Column  # address, of padded rows
    b_columns: Column  # elements
    output: Column  # address, of padded rows
    output_columns: Column  # elements
    m: Column  # elements
    n: Column  # elements
    k: Column  # elements
    row_scales: Column  # address of the diagonal K of the rows
    column_scales: Column  # address
    row_sums: Column  # address, of P's squares by row, a float32 a tile column
    sums_rows: Column  # elements, of a tile column of those
    tile_sums: Column  # address, of P's squares, a float32 a tile
    largest: Column  # address, as of the momentum's; 0 for X_A N
    largest_count: Column  # count


class Rows(NamedTuple):
    """v, and what it divides rows by, by `directions._rows_kernel`."""

    m: Column  # elements
    n: Column  # elements
    member: Column  # index
    row_sums: Column  # address, as of directions
    row_sums_count: Column  # count, of tile columns
    tile_sums: Column  # address
    tile_sums_count: Column  # count
    factors: Column  # address, of what P's rows are multiplied by
    totals: Column  # address, of sums over rows of squares of that, a float32 a block


class Descent(NamedTuple):
    """The step of a parameter, by `directions._descend_kernel`."""

    direction: Column  # address, of padded rows: P
    columns: Column  # elements, of its rows
    m: Column  # elements
    n: Column  # elements
    wide: Column  # 1 where P is float32 whatever the GEMM dtype is, or 0
    dtype: Column  # name, of the parameter
    member: Column  # index
    factors: Column  # address, as of rows; 0 where rows are not balanced
    totals: Column  # address, of partial sums of squares: of rows, or P's by tile
    totals_count: Column  # count


SCALE, MOMENTUM, TRANSFORM, GRAM = map(columns, (Scale, Momentum, Transform, Gram))
DAMPED, SYMMETRIC, ROOT = map(columns, (Damped, Symmetric, Root))
DIRECTION, ROWS, DESCENT = map(columns, (Direction, Rows, Descent))
