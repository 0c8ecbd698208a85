"""Names of what the kernels of root-free Shampoo read from device tables, as kernels/slots.py has.

*wide* says that a matrix in the scratch is float32 whatever the GEMM dtype is: both of its axes are
diagonal, and no GEMM reads it.
"""

from __future__ import annotations

from typing import NamedTuple

from .slots import Column, Names, columns


class ShampooScalars(NamedTuple):
    """What kernels/gradients.py, kernels/roots.py and kernels/directions.py read."""

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


class _Role(NamedTuple):
    """What a job of the transform launch computes."""

    right: int = 0  # Y = G K_B
    left: int = 1  # Z = K_A^T G
    scaled: int = 2  # either of them where that K is diagonal
    momentum: int = 3  # M and N


DTYPE, ROLE = map(Names, (_Dtype(), _Role()))


class Scale(NamedTuple):
    """A copy into padded rows, by `gradients._scale_kernel`: of a gradient, or of a K or K K^T."""

    source: Column  # address; of a gradient the index of its member
    target: Column  # address, of padded rows
    rows: Column  # elements
    columns: Column  # elements
    stats: Column  # address, as of `gradients.scale_of`; 0 for a K or K K^T
    stats_count: Column  # count
    dtype: Column  # name, of the gradient
    wide: Column  # 1 or 0


class Transform(NamedTuple):
    """Y or Z, or M and N, by `gradients._transform_kernel`."""

    gradient: Column  # address, of padded rows
    factor: Column  # address, of padded rows: K
    output: Column  # address, of padded rows: Y or Z, if they are kept, or N
    m: Column  # elements
    n: Column  # elements
    role: Column  # name
    wide: Column  # 1 or 0
    row_scales: Column  # address of the diagonal K of the rows
    column_scales: Column  # address
    row_sums: Column  # address, of the squares of a row's elements, a float32 a tile column
    column_sums: Column  # address, as row_sums
    stats: Column  # address, as of `gradients.scale_of`
    stats_count: Column  # count
    member: Column  # index
    largest: Column  # address, of N's largest magnitude a tile; after them 1, or 0 where G is zero


class Gram(NamedTuple):
    """S, by `roots._grams_kernel`."""

    seen: Column  # address, of Y or Z; for a diagonal S of partial sums of their squares
    size: Column  # elements, d
    others: Column  # elements, e: the other axis
    columns: Column  # elements, of Y or Z; for a diagonal S the count of partial sums
    side: Column  # name
    gram: Column  # address
    copy: Column  # address, of padded rows
    trace: Column  # address, of partial sums of the diagonal, a float32 a diagonal tile
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned
    nonzero: Column  # address, of 1, or 0 where G is zero


class Damped(NamedTuple):
    """T = (S + lam I) K, by `roots._damped_kernel`; of a diagonal axis K itself."""

    gram: Column  # address, of padded rows
    factor: Column  # address, of padded rows
    output: Column  # address, of padded rows; of a diagonal axis 0
    size: Column  # elements, d
    trace: Column  # address, as of grams
    trace_count: Column  # count
    nonzero: Column  # address


class Symmetric(NamedTuple):
    """E, by `roots._residuals_kernel`, and ||E^2||, by `roots._squares_kernel`."""

    a: Column  # address, of padded rows: K; E
    b: Column  # address, of padded rows: T; E
    output: Column  # address, of padded rows: E; 0
    size: Column  # elements, d
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

    A k of 0 means that both axes are diagonal: A is N, wide, and P takes its place.
    """

    a: Column  # address, of padded rows
    b: Column  # address, of padded rows
    output: Column  # address, of padded rows
    m: Column  # elements
    n: Column  # elements
    k: Column  # elements
    row_scales: Column  # address of the diagonal K of the rows
    column_scales: Column  # address
    row_sums: Column  # address, of P's squares by row, a float32 a tile column
    tile_sums: Column  # address, of P's squares, a float32 a tile
    largest: Column  # address, of N's largest magnitude a tile; 0 where that is taken out
    averages: Column  # address, of a copy of the averages of rows' mean squares
    member: Column  # index


class Descent(NamedTuple):
    """The step of a parameter, by `directions._descend_kernel`."""

    direction: Column  # address, of padded rows: P
    m: Column  # elements
    n: Column  # elements
    wide: Column  # 1 or 0
    dtype: Column  # name, of the parameter
    member: Column  # index
    row_sums: Column  # address, as of directions
    row_sums_count: Column  # count, of tile columns
    tile_sums: Column  # address
    tile_sums_count: Column  # count
    averages: Column  # address; 0 where rows are not balanced


SCALE, TRANSFORM, GRAM, DAMPED = map(columns, (Scale, Transform, Gram, Damped))
SYMMETRIC, ROOT, DIRECTION, DESCENT = map(columns, (Symmetric, Root, Direction, Descent))
