"""Names of all that kernels read from device tables; builders write by the same names.

A row of a table is a NamedTuple, so that one with a missing or an unknown column is refused by its
name. `columns` has the index of each for kernels: `tl.load(job_ptr + MOMENTA.size)`. That is one
constexpr a table and not one a column, because Triton compares every global of a kernel with what
it was at every launch; and a constexpr, because its cache would not see a change of others.

Tables of jobs are int64. Units: *address*, of a byte, or -1 - the index of a byte in the scratch,
or 0 where there is nothing; *elements*; *count*; *index*; *name*, one of those below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

Column = Tensor | int  # an entry a job, or one for all


class Names(tl.constexpr):
    """Numbers by name, on the host and in kernels; `len` is their count.

    They are ints there too: where Triton asks for a constexpr, as it does for a shape, annotate a
    name as one.
    """

    def __init__(self, numbers: Any) -> None:
        super().__init__(numbers)
        vars(self).update(numbers._asdict())

    def __len__(self) -> int:
        return len(self.value)

    def __ne__(self, other: object) -> bool:  # in less than half a constexpr's time
        return bool(self.value != getattr(other, "value", None))


def columns(row: Any) -> Names:
    """The index of each column of a kind of row."""
    return Names(row(*range(len(row._fields))))


class _Layout(NamedTuple):
    job_columns: int = 20  # of a table of jobs, whatever their kind
    matrix: int = 19  # of them, in every job: the index of its matrix in the stacks of its bucket
    row_multiple: int = 8  # elements, of padded rows in the scratch: 16 bytes in 16-bit dtypes
    alignment: int = 16  # bytes
    spilled_rows: int = 8  # that are worked on at a time where rows are not aligned


class _Gathered(NamedTuple):
    state: int = 0  # a factor or a product, in the GEMM dtype
    gradient: int = 1  # to the GEMM dtype
    wide_gradient: int = 2  # to float32: both factors are diagonal, and no GEMM reads it


class _Side(NamedTuple):
    rows: int = 0  # a factor of the rows: M M^T
    columns: int = 1  # of the columns: M^T M
    diagonal: int = 2  # a diagonal factor of either


class _Structure(NamedTuple):
    ragged: int = 0  # a dense factor whose rows do not all start on 16 bytes
    aligned: int = 1  # one whose rows do
    diagonal: int = 2


LAYOUT, GATHERED, SIDE, STRUCTURE = map(Names, (_Layout(), _Gathered(), _Side(), _Structure()))


def padded(size: int) -> int:
    """The length of a padded row of `size` elements: `tiles.padded` on the host."""
    return -(-size // LAYOUT.row_multiple) * LAYOUT.row_multiple


# Scalars: float32 vectors -----------------------------------------------------------------------


class RMSpropScalars(NamedTuple):
    """What kernels/diag_bodies.py reads for root-free RMSProp."""

    lr: float  # 0 where it is read on the device
    sign: float  # of the gradient: -1 to ascend
    batch_size: float
    damping: float
    decoupled: float  # weight decay, 0 where it is coupled
    coupled: float
    alpha: float
    one_minus_alpha: float
    momentum: float
    square_weight: float  # these three are read where there are squares of micro-batches
    signal_weight: float
    floor_weight: float


class AdamWScalars(NamedTuple):
    """What kernels/diag_bodies.py reads for root-free AdamW."""

    lr: float
    sign: float
    batch_size: float
    damping: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    log_beta1: float
    log_beta2: float
    square_weight: float  # as those of root-free RMSProp
    signal_weight: float
    floor_weight: float


class SignScalars(NamedTuple):
    """What kernels/diag_bodies.py reads for sign descent."""

    lr: float
    sign: float
    weight_decay: float
    beta: float
    one_minus_beta: float
    sign_last: float  # 1 or 0
    part_weight: float  # read where there are signs of micro-batches


class VectorAdamScalars(NamedTuple):
    """What kernels/diag_bodies.py reads for the vectors of root-free Shampoo."""

    lr: float
    sign: float
    weight_decay: float
    update_rms: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    log_beta1: float
    log_beta2: float


class IFShampooScalars(NamedTuple):
    """What kernels/factors.py and kernels/params.py read."""

    lr: float
    batch_size: float
    damping: float
    factor_momentum: float
    one_minus_factor_momentum: float
    factor_lr: float
    sign: float  # of the preconditioned gradient: -1 to ascend
    decoupled: float
    coupled: float
    momentum: float
    bound: float  # of an entry of P, inf where there is none


RMSPROP, ADAMW, SIGN, VECTOR_ADAM, IFSHAMPOO = map(
    columns, (RMSpropScalars, AdamWScalars, SignScalars, VectorAdamScalars, IFShampooScalars)
)


# Tensors ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A tensor of a diagonal launch: int64, in `tables.Launch.rows`."""

    param: Column  # address
    grad: Column  # address
    first_state: Column  # address
    second_state: Column  # address; 0 where there is none
    parts: Column  # address of what is summed over micro-batches; 0 where there is nothing
    length: Column  # elements
    first_program: Column  # index
    aligned: Column  # elements in its full chunks, if they may promise alignment; else 0
    index: Column  # in the caller's lists


class Beside(NamedTuple):
    """What a tensor in fewer bytes has beside its `Row`: int64, in `tables.Launch.beside`."""

    residual: Column  # address, as those of scales; 0 where it has none
    first_scales: Column  # address, one a block
    second_scales: Column  # address, one a block
    seed: Column  # 32 bits
    first_index: Column  # of its first element in its whole, modulo 2^32


class Member(NamedTuple):
    """A matrix among all of a step of a matrix method: int64; 0 where it has none."""

    param: Column  # address
    grad: Column  # address
    buffer: Column  # address of the momentum buffer
    averages: Column  # address of the averages of its rows' mean squares (root-free Shampoo)


class Tile(NamedTuple):
    """A program of a launch of a matrix method: int32."""

    job: Column  # index
    row: Column  # index, in tiles
    column: Column  # index, in tiles
    index: Column  # among the tiles of its job


ROW, BESIDE, MEMBER, TILE = map(columns, (Row, Beside, Member, Tile))


# Jobs: each a matrix that a launch computes -----------------------------------------------------


class Gather(NamedTuple):
    """A copy, by `products._gather_kernel`."""

    source: Column  # address; of a gradient the index of its member
    target: Column  # address, of padded rows
    rows: Column  # elements
    columns: Column  # elements
    target_rows: Column  # elements, with zeros for what the source has not
    target_columns: Column  # elements, as target_rows
    sums: Column  # address, of a float32 a tile: squares; of a gradient how many are not 0
    gathered: Column  # name
    aligned: Column  # whether rows of the source are padded, 1 or 0; of a gradient it is not read


class Product(NamedTuple):
    """A B, by `products._product_kernel`: left (A transposed), right and precondition.

    With a diagonal factor on either side it is scaled. A k of 0 means that both are diagonal: A is
    G, in float32, and the product A scaled.
    """

    a: Column  # address
    a_columns: Column  # elements
    b: Column  # address
    b_columns: Column  # elements
    output: Column  # address, of padded rows
    output_columns: Column  # elements
    m: Column  # elements
    n: Column  # elements
    k: Column  # elements
    row_scales: Column  # address of the diagonal factor of the rows
    column_scales: Column  # address
    row_sums: Column  # address, of the squares of a row's elements, a float32 a tile column
    column_sums: Column  # address, as row_sums


class Momenta(NamedTuple):
    """A factor momentum, by `factors._factor_momenta_kernel`."""

    factor: Column  # address, of padded rows
    transformed: Column  # address, of M; for a diagonal factor of partial sums of its squares
    size: Column  # elements, d: of the factor, or of a block
    lives: Column  # elements of them that are no padding
    others: Column  # elements, e: the other axis
    columns: Column  # elements, of rows of M; for a diagonal factor the count of partial sums
    side: Column  # name
    momentum: Column  # address
    copy: Column  # address, of padded rows; not where m itself is aligned
    trace: Column  # address, of partial ||other factor||^2, or of a diagonal other factor itself
    trace_count: Column  # count
    trace_squares: Column  # whether they are yet to be squared, 1 or 0
    norms: Column  # address, of partial ||m||^2, a float32 a tile
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned
    nonzeros: Column  # address, of counts of G's elements that are not 0, a float32 a tile
    nonzeros_count: Column  # count


class Factors(NamedTuple):
    """A factor, by `factors.finish_factor`; a diagonal one by `factors._factors_kernel`."""

    old: Column  # address, of padded rows: the factor before
    operand: Column  # address, of padded rows: m
    size: Column  # elements, d
    factor: Column  # address
    residual: Column  # address
    copy: Column  # address, of padded rows; not where the factor itself is aligned
    norms: Column  # address, of partial ||m||^2
    norms_count: Column  # count
    structure: Column  # name
    spill: Column  # address, of padded rows in float32
    nonzeros: Column  # address, as of momenta
    nonzeros_count: Column  # count


class Square(NamedTuple):
    """K K^T, by `products._products_kernel`, its stacked twin or `roots._inverses_kernel`."""

    factor: Column  # address, of padded rows
    product: Column  # address
    size: Column  # elements, d
    copy: Column  # address, of padded rows; not where the product itself is aligned
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned
    state: Column  # address, of the K that the factor is to be copied to; else 0


class Params(NamedTuple):
    """P = A B and the descent, by `params._params_kernel`.

    A k of 0 means that both factors are diagonal: G lies in `spill`, and P is G scaled.
    """

    a: Column  # address
    a_columns: Column  # elements
    b: Column  # address
    b_columns: Column  # elements
    member: Column  # index
    first: Column  # elements of the parameter before those of the job
    columns: Column  # elements, of rows of the parameter
    m: Column  # elements
    n: Column  # elements
    k: Column  # elements
    row_scales: Column  # address of the diagonal factor of the rows
    column_scales: Column  # address
    spill: Column  # address, of padded rows in float32; 0 where rows are aligned


GATHER, PRODUCT, MOMENTA = map(columns, (Gather, Product, Momenta))
FACTORS, SQUARE, PARAMS = map(columns, (Factors, Square, Params))
