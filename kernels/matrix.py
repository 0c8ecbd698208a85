"""IF-Shampoo in Triton: 8 launches an update of any number of matrices of any shapes.

For a gradient G (d_C, d_K) with factors C and K (reference/matrix.py is the specification):

    gather           G -> GEMM dtype, old factors -> copies, partial ||factor||_F^2
    left             T = C^T G
    right            M = T K                                   (the sums of squares of its rows or
                                                               columns where a factor is diagonal)
    momenta          m of each factor, as kernels/factors.py has it
    factors          K <- K - factor_lr / max(1, ||m||_F) K m, there too
    products         C C^T and K K^T
    precondition     V = (C C^T) G
    params           P = V (K K^T) and the descent, as kernels/params.py has it

A step between updates is gather, precondition and params. A diagonal factor takes part as a
row or column scale of its neighbour's GEMM, which is then the only one.

Each line is one launch for all matrices, one a dtype for gather and params. On Hopper, stacks
of enough aligned matrices (`suits_stacks`) have launches of their own: cuBLAS for left, right and
precondition, stacked kernels for factors and products, one an axis. Roundings are the same; the
milliseconds of 114 of 1024 x 1024 and of 16 of 2048 x 2048 on an H200 (torch 2.11, Triton 3.6):

                                 one launch for all    one a stack
    left, right, precondition    1.29    1.29          1.04    1.11
    factors                      1.33    1.13          1.21    1.04
    products                     0.52    0.49          0.47    0.45

bench/HISTORY.md has other sizes, and what was not faster by stacks.

Shapes: params (d_C, d_K) up to axes of size 1; factors dense (d, d) or diagonal (d,). Dtypes:
params and grads float32, bfloat16 or float16; a GEMM's operands and the intermediates G, T, M, V
bfloat16, or float32 for float32 factors (three TF32 products, never one); accumulation, norms,
scalars and everything that has no GEMM float32. A bfloat16 factor is stored with a residual
(reference.split) and keeps 24 bits; GEMMs read the bfloat16 half. FLOPs of an n x n weight: 18 n^3
an update, 4 n^3 else.

Matrices in the scratch have rows padded with zeros (`slots.padded`); state whose rows are of other
lengths is copied there for GEMMs to read. T, M and V are rounded to the GEMM dtype, and so are m
and the products when stored; H and P are not. The scratch takes 10 bytes a parameter of an n x n
bfloat16 weight at an update (G, T or V, M, the old factors) and 4 between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .calls import kind_of
from .factors import _factor_momenta_kernel, _factors_kernel, finish_factor
from .matrix_axes import serves
from .matrix_jobs import build_plan
from .matrix_launches import (
    B,
    Launches,
    PreparedMatrices,
    accessible,
    are_accessible,
    copy_back,
    prepared,
)
from .matrix_launches import move_grads as move_grads
from .matrix_plan import (
    BucketOfMatrices,
    MatrixBucket,
    MatrixPlan,
    Tiling,
    flops_of,
    kept_plan,
    starts_aligned,
)
from .params import _params_kernel
from .products import (
    _gather_kernel,
    _product_kernel,
    _products_kernel,
    finish_product,
)
from .slots import LAYOUT, IFShampooScalars
from .tables import DTYPES, readable, scalar_table

# 64 accumulators a thread and 32 KB a stage. On an H200, 114 of 1024 x 1024: 5.45 ms a step with
# the limit below; 6.62 with 4 stages, 5.89 on 4 warps, 8.39 in tiles of 64 x 64.
LARGE = Tiling(block=128, block_k=64, num_warps=8, num_stages=3, precision=None)
# Without the limit some kernels take 130 to 170 registers (Triton 3.6) and one program fills a
# multiprocessor; with it two do, and nothing spills. On sm_80 and sm_100 it would spill.
LARGE_HOPPER = LARGE._replace(max_registers=128)
# Fewer large tiles than multiprocessors leave some idle; small matrices leave tiles half empty.
SMALL = Tiling(block=64, block_k=64, num_warps=4, num_stages=4, precision=None)
# The multiprocessors of an H100. A stack of so many gets launches of its own on Hopper: on an H200
# 1024 tiles (64 of 512 x 512) gain 8 % of an update by that, 160 (40 of 256 x 256) nothing.
ENOUGH_LARGE_TILES = 132
# What a FLOP in SMALL tiles takes of one in LARGE: 8.39 ms to 5.45, above.
SMALL_TILES_TAKE = 1.54
# Small matrices beside large ones get launches of their own where that saves so many FLOPs in large
# tiles: eight launches more take 0.04 ms of an H200 (bench/HISTORY.md), at 400 TFLOP/s. Root-free
# Shampoo has thirteen, and a third more FLOPs.
WORTH_LAUNCHES = 16e9
# Three TF32 products a product keep 23 of the 24 bits of each operand. On an H200, 114 of 1024 x
# 1024: 59 ms a step, by scalar units 105 ms in 64 x 64 x 16 tiles and 79 ms in 128 x 128 x 16.
FLOAT32 = Tiling(block=64, block_k=32, num_warps=4, num_stages=3, precision="tf32x3")

# In-tile offsets are 32 bits wide: 128 rows of at most this many elements.
MAX_COLUMNS = 2**24
_plans: dict[Any, MatrixPlan] = {}


def buckets_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor_momenta: Sequence[Tensor],
    products: Sequence[Tensor],
    *,
    axes: Sequence[int],
    sizes: Sequence[Sequence[int]],
    joint_norms: Sequence[bool] | None = None,
) -> list[MatrixBucket | None]:
    """The operator's tensors by bucket; None for one that the kernels do not serve.

    sizes: of the axes of each bucket.

    Those are buckets with other than two axes, in float64, without products, or with blocks of a
    size that is no multiple of 8. Each of the four
    lists of factor state has a stack an axis of each bucket, `axes` counts the axes, and params and
    grads follow the buckets.
    """
    found = []
    first = member = 0
    for count, own_sizes in zip(axes, sizes, strict=True):
        last = first + count
        indices = range(member, member + len(factors[first]))
        state = [t[first:last] for t in (factors, residuals, factor_momenta, products)]
        joint = joint_norms[first:last] if joint_norms else (False, False)
        found.append(
            _bucket(params, grads, indices, *state, own_sizes, joint) if count == 2 else None
        )
        first, member = last, indices.stop
    return found


def prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor_momenta: Sequence[Tensor],
    products: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    axes: Sequence[int],
    sizes: Sequence[Sequence[int]],
    joint_norms: Sequence[bool] | None = None,
    update_factors: bool,
) -> list[PreparedMatrices] | None:
    """What `launch` takes, where every bucket is served and no tensor has to be copied.

    The operator's tensors, whose products are not stale; gradients may move, see `move_grads`.
    """
    state = factors, residuals, factor_momenta, products
    own = {"axes": axes, "sizes": sizes, "joint_norms": joint_norms}
    buckets = buckets_of(params, grads, *state, **own)
    served = list(filter(None, buckets))
    lists = _lists(params, grads, momentum_buffers)
    if len(served) < len(buckets) or not are_accessible(lists):
        return None
    plan = functools.partial(_find_plan, update=update_factors, refresh=False)
    return prepared(served, lists, parted, plan)


def ifshampoo_(
    buckets: Sequence[MatrixBucket],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: Tensor,
    *,
    update_factors: bool,
    refresh_products: bool,
    **settings: Any,
) -> None:
    """One IF-Shampoo step on these buckets of matrices.

    buckets: `buckets_of` the same params and grads; momentum_buffers is empty where there are none.
    lr and settings: as `launch` takes them.
    """
    lists = _lists(params, grads, momentum_buffers)
    dense = {name: list(map(accessible, tensors)) for name, tensors in lists.items()}
    refresh = refresh_products and not update_factors
    plan = functools.partial(_find_plan, update=update_factors, refresh=refresh)
    launch(prepared(buckets, dense, parted, plan), lr, **settings)
    for name, results in dense.items():
        if name != "grad":
            copy_back(lists[name], results, buckets)


def launch(
    steps: Sequence[PreparedMatrices],
    lr: float | Tensor,
    *,
    factor_lr: float,
    factor_momentum: float,
    damping: float,
    batch_size: float,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    bound: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One IF-Shampoo step on matrices that are prepared.

    lr is a number, or a 0-d tensor, on the CPU or on the parameters' device; there a captured graph
    reads it at every replay. grad_scale and found_inf are as `diag.launch` takes them.
    """
    on_device_lr = lr if isinstance(lr, Tensor) and not lr.is_cpu else None
    scalars = IFShampooScalars(
        lr=float(lr) if on_device_lr is None else 0.0,
        batch_size=batch_size,
        damping=damping,
        factor_momentum=factor_momentum,
        one_minus_factor_momentum=1 - factor_momentum,
        factor_lr=factor_lr,
        sign=-1.0 if maximize else 1.0,
        decoupled=weight_decay if decoupled else 0.0,
        coupled=0.0 if decoupled else weight_decay,
        momentum=momentum,
        bound=math.inf if bound is None else bound,
    )
    for step in steps:
        with torch.cuda.device(step.device.index if step.device.type == "cuda" else -1):
            tensors = [readable(t, step.device) for t in (on_device_lr, grad_scale, found_inf)]
            _run(step, scalar_table(step.device, scalars).on_device(), *tensors)


def _lists(
    params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor]
) -> dict[str, Sequence[Tensor]]:
    return {"param": params, "grad": grads, **({"buffer": buffers} if buffers else {})}


def _bucket(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: range,
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    momenta: Sequence[Tensor],
    products: Sequence[Tensor],
    sizes: Sequence[int],
    joint_norms: Sequence[bool],
) -> MatrixBucket | None:
    """The bucket of these members, or None where the kernels do not take it."""
    param_dtypes, grad_dtypes = ([tensors[i].dtype for i in indices] for tensors in (params, grads))
    if any(dtype not in DTYPES for dtype in (*param_dtypes, *grad_dtypes)):
        return None
    dense = factors[0].dim() > 2, factors[1].dim() > 2
    if (
        not serves(factors)
        or sizes[1] > MAX_COLUMNS
        or len({f.dtype for f, d in zip(factors, dense, strict=True) if d}) > 1
    ):
        return None
    state = factors, residuals, momenta, products
    for is_dense, factor, residual, moment, product in zip(dense, *state, strict=True):
        bfloat16 = is_dense and factor.dtype == torch.bfloat16
        stacks = [factor, moment]
        if is_dense:
            stacks.append(product)
        if bfloat16:
            stacks.append(residual)
        if (
            not (bfloat16 or factor.dtype == torch.float32)
            or moment.dtype != factor.dtype
            or any(t.shape != factor.shape or not t.is_contiguous() for t in stacks)
        ):
            return None
    return MatrixBucket(
        (sizes[0], sizes[1]),
        dense,
        (factors[0].shape[-1], factors[1].shape[-1]),
        (joint_norms[0], joint_norms[1]),
        tuple(indices),
        tuple(param_dtypes),
        tuple(grad_dtypes),
        *state,
    )


def tiling_of(
    device: torch.device, dtype: torch.dtype, buckets: Sequence[BucketOfMatrices]
) -> Tiling:
    """How the GEMMs of buckets that share launches are cut: see `parted`."""
    if dtype == torch.float32:
        return FLOAT32
    enough = sum(map(_large_tiles, buckets)) >= ENOUGH_LARGE_TILES
    if not enough or sum(map(_saved_by_small_tiles, buckets)) > 0:
        return SMALL
    return LARGE_HOPPER if _is_hopper(device) else LARGE


def parted(device: torch.device, dtype: torch.dtype, buckets: Sequence[B]) -> list[Sequence[B]]:
    """These buckets by tiling, each part with launches of its own: two parts if that pays."""
    small = [bucket for bucket in buckets if _saved_by_small_tiles(bucket) > 0]
    large = [bucket for bucket in buckets if _saved_by_small_tiles(bucket) <= 0]
    pays = sum(map(_saved_by_small_tiles, small)) > WORTH_LAUNCHES
    if pays and large and tiling_of(device, dtype, large).block == LARGE.block:
        return [large, small]
    return [buckets]


def _saved_by_small_tiles(bucket: BucketOfMatrices) -> float:
    """FLOPs in large tiles that take as long as what small tiles save; less than 0 if they lose."""
    return flops_of(bucket, LARGE.block) - SMALL_TILES_TAKE * flops_of(bucket, SMALL.block)


def _large_tiles(bucket: BucketOfMatrices) -> int:
    rows, columns = bucket.sizes
    return (rows // LARGE.block) * (columns // LARGE.block) * len(bucket.indices)


@lru_cache(maxsize=64)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def suits_stacks(bucket: BucketOfMatrices, state: Sequence[Tensor], tiling: Tiling) -> bool:
    """Whether a bucket has launches of its own: all rows aligned, enough tiles to fill them."""
    return (
        tiling == LARGE_HOPPER
        and _large_tiles(bucket) >= ENOUGH_LARGE_TILES
        and all(bucket.dense)
        and bucket.blocks == bucket.sizes
        and all(size % LAYOUT.row_multiple == 0 for size in bucket.sizes)
        and all(map(starts_aligned, state))
    )


def _find_plan(
    device: torch.device,
    dtype: torch.dtype,
    buckets: Sequence[MatrixBucket],
    *,
    update: bool,
    refresh: bool,
) -> tuple[MatrixPlan, Tiling]:
    tiling = tiling_of(device, dtype, buckets)
    stacked = [suits_stacks(bucket, bucket.state, tiling) for bucket in buckets]
    members = [bucket.members for bucket in buckets]
    stacks = [tuple(map(Tensor.data_ptr, bucket.state)) for bucket in buckets]
    key = (device, dtype, tiling, *stacked, update, refresh, *members, *stacks)

    def build() -> MatrixPlan:
        return build_plan(buckets, stacked, dtype, tiling, device, update=update, refresh=refresh)

    return kept_plan(_plans, key, build), tiling


def _run(
    step: PreparedMatrices,
    numbers: Tensor,
    lr: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The launches of all buckets of a device and a GEMM dtype; numbers have an lr that is None."""
    launches = Launches(step, kind_of(lr, grad_scale, found_inf), numbers, found_inf)
    launch, multiply = launches.launch, launches.multiply
    members = step.members.on_device()
    launches.elementwise("gather", _gather_kernel, members, grad_scale)
    launch("left", _product_kernel, TRANS_A=True)
    multiply("left")
    launch("right", _product_kernel, TRANS_A=False)
    multiply("right")
    args = numbers, found_inf
    launch("momenta", _factor_momenta_kernel, *args)
    launch("factors", _factors_kernel, *args, finish=finish_factor)
    launch("products", _products_kernel, found_inf, finish=finish_product)
    launch("precondition", _product_kernel, TRANS_A=False)
    multiply("precondition")
    args = members, numbers, numbers if lr is None else lr, found_inf
    launch("params", _params_kernel, *args, HAS_BUF=step.has_buffers)
