"""Root-free Shampoo in Triton: 13 launches a step of any number of matrices of any shapes.

For a gradient G (m, n) with S and K of axes A and B (reference/rootfree_shampoo.py is the
specification):

    scale        maxima and sums of squares for rms(G)
    momentum     G / rms(G) -> GEMM dtype;  M and N
    transform    Y = G K_B, Z = K_A^T G                                             (gradients.py)
    grams        S <- S + (1 - beta2) (S_hat - S)                                   (grams.py)
    damped       T = S K + lam K
    residuals    E = K^T T - I
    squares      ||E E||_F^2
    roots        K <- K - (b / 2) K E
    inverses     X = K K^T                                                          (roots.py)
    left         X_A N
    directions   P = (X_A N) X_B
    rows         v
    descend      p                                                                  (directions.py)

A step between updates leaves out those from transform to roots, and inverses where X is kept. Each
line is one launch for all matrices, both axes and all dtypes of parameters and gradients. On
Hopper, stacks of enough aligned matrices (`_is_stacked`) have launches of their own: cuBLAS for
transform, damped and left, the stacked kernel for squares, roots, inverses and directions, one an
axis. In grams and residuals it would spill.

Shapes: params (m, n) up to their axes; S and K dense (d, d) or diagonal (d,). Dtypes: params and
grads float32, bfloat16 or float16; S, M and v float32; a dense K bfloat16 with a residual
(reference.split) or float32, and so GEMMs' operands and intermediates (three TF32 products for
float32, never one); a diagonal K float32; accumulation, sums and scalars float32. FLOPs of an n x n
weight: 24 n^3 a step, 4 n^3 between updates. Scratch: 20 bytes a parameter of an n x n bfloat16
weight at an update, 8 between, 4 more where X is not kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import kind_of
from .directions import (
    _descend_kernel,
    _directions_kernel,
    _rows_kernel,
    finish_direction,
)
from .gradients import _momentum_kernel, _scale_kernel, _transform_kernel
from .grams import _grams_kernel
from .matrix import MAX_COLUMNS, parted, suits_stacks, tiling_of
from .matrix_axes import serves
from .matrix_launches import (
    Launches,
    PreparedMatrices,
    accessible,
    are_accessible,
    copy_back,
    prepared,
)
from .matrix_launches import move_grads as move_grads
from .matrix_plan import MatrixPlan, Tiling, kept_plan
from .rootfree_shampoo_buckets import ShampooBucket
from .rootfree_shampoo_jobs import ROWS, build_plan
from .rootfree_shampoo_slots import ShampooScalars
from .roots import (
    _damped_kernel,
    _inverses_kernel,
    _residuals_kernel,
    _roots_kernel,
    _squares_kernel,
    finish_inverse,
    finish_root,
    finish_square,
)
from .tables import DTYPES, readable, scalar_table

# Without a limit branches that no aligned matrix takes cost two of four programs in flight.
MOMENTUM_REGISTERS = 64
_plans: dict[Any, MatrixPlan] = {}


def buckets_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    grams: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    products: Sequence[Tensor],
    *,
    sizes: Sequence[Sequence[int]],
) -> list[ShampooBucket | None]:
    """The operator's tensors by bucket; None for one that the kernels do not serve.

    Those are buckets in float64, or with blocks of a size that is no multiple of 8. Each of the
    four lists of factor state has two stacks a bucket, one an axis, and params and grads follow the
    buckets. sizes: of the axes of each bucket.
    """
    found = []
    first = 0
    for axis, own_sizes in zip(range(0, len(factors), 2), sizes, strict=True):
        indices = range(first, first + len(factors[axis]))
        state = [t[axis : axis + 2] for t in (grams, factors, residuals, products)]
        found.append(_bucket(params, grads, indices, *state, own_sizes))
        first = indices.stop
    return found


def prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    row_square_avgs: Sequence[Tensor],
    grams: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    products: Sequence[Tensor],
    *,
    sizes: Sequence[Sequence[int]],
    update_factors: bool,
) -> list[PreparedMatrices] | None:
    """What `launch` takes, where every bucket is served and no tensor has to be copied.

    The operator's tensors, whose products are not stale; gradients may move, see `move_grads`.
    """
    buckets = buckets_of(params, grads, grams, factors, residuals, products, sizes=sizes)
    lists = _lists(params, grads, momentum_buffers, row_square_avgs)
    served = list(filter(None, buckets))
    if len(served) < len(buckets) or not are_accessible(lists):
        return None
    return prepared(served, lists, parted, _plans_of(lists, update_factors, refresh=False))


def rootfree_shampoo_(
    buckets: Sequence[ShampooBucket],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    row_square_avgs: Sequence[Tensor],
    steps: Tensor,
    lr: Tensor,
    *,
    update_factors: bool,
    refresh_products: bool,
    **settings: Any,
) -> None:
    """One step of root-free Shampoo on these buckets of matrices.

    buckets: `buckets_of` the same params and grads. row_square_avgs is empty where row_beta is
    None. steps, lr and settings: as `launch` takes them.
    """
    lists = _lists(params, grads, momentum_buffers, row_square_avgs)
    dense = {
        name: [t.contiguous() if name == "averages" else accessible(t) for t in tensors]
        for name, tensors in lists.items()
    }
    plans = _plans_of(lists, update_factors, refresh_products and not update_factors)
    launch(prepared(buckets, dense, parted, plans), steps, lr, **settings)
    for name in ("param", "buffer", "averages"):
        if name in lists:
            copy_back(lists[name], dense[name], buckets)


def launch(
    prepared_steps: Sequence[PreparedMatrices],
    steps: Tensor,
    lr: float | Tensor,
    *,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    update_rms: float,
    row_beta: float | None,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of root-free Shampoo on matrices that are prepared.

    steps: float32, (params,), counts this step. row_beta is None where they were prepared without
    averages of rows. lr is a number, or a 0-d tensor, on the CPU or on the parameters' device;
    there a captured graph reads it at every replay, and the steps. grad_scale and found_inf are as
    `diag.launch` takes them.
    """
    on_device_lr = lr if isinstance(lr, Tensor) and not lr.is_cpu else None
    scalars = ShampooScalars(
        lr=float(lr) if on_device_lr is None else 0.0,
        sign=-1.0 if maximize else 1.0,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        damping=damping,
        weight_decay=weight_decay,
        update_rms=update_rms,
        one_minus_row_beta=math.nan if row_beta is None else 1 - row_beta,
    )
    for step in prepared_steps:
        device = step.device
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            tensors = [readable(t, device) for t in (on_device_lr, grad_scale, found_inf)]
            numbers = scalar_table(device, scalars).on_device()
            _launch(step, numbers, readable(steps.contiguous(), device), *tensors)


def _lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    averages: Sequence[Tensor],
) -> dict[str, Sequence[Tensor]]:
    lists = {"param": params, "grad": grads, "buffer": buffers}
    return {**lists, "averages": averages} if averages else lists


def _bucket(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: range,
    grams: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    products: Sequence[Tensor],
    sizes: Sequence[int],
) -> ShampooBucket | None:
    """The bucket of these members, or None where the kernels do not take it."""
    param_dtypes, grad_dtypes = ([tensors[i].dtype for i in indices] for tensors in (params, grads))
    dense = factors[0].dim() > 2, factors[1].dim() > 2
    factor_dtypes = {f.dtype for f, d in zip(factors, dense, strict=True) if d}
    if (
        any(dtype not in DTYPES for dtype in (*param_dtypes, *grad_dtypes))
        or sizes[1] > MAX_COLUMNS
        or not serves(factors)
        or not factor_dtypes <= {torch.float32, torch.bfloat16}
        or len(factor_dtypes) > 1
        or any(gram.dtype != torch.float32 for gram in grams)
        or not all(t.is_contiguous() for t in (*grams, *factors, *residuals, *products))
    ):
        return None
    state = grams, factors, residuals, products
    return ShampooBucket(
        (sizes[0], sizes[1]),
        dense,
        (factors[0].shape[-1], factors[1].shape[-1]),
        tuple(indices),
        tuple(param_dtypes),
        tuple(grad_dtypes),
        *state,
    )


def _is_stacked(bucket: ShampooBucket, tiling: Tiling) -> bool:
    """Whether products of a bucket are of whole stacks: all rows aligned, enough tiles."""
    return (
        bool(bucket.products)
        and all(t.numel() for t in bucket.state)
        and suits_stacks(bucket, bucket.state, tiling)
    )


def _plans_of(lists: dict[str, Sequence[Tensor]], update: bool, refresh: bool) -> Any:
    balanced = "averages" in lists
    return functools.partial(_find_plan, update=update, refresh=refresh, balanced=balanced)


def _find_plan(
    device: torch.device, dtype: torch.dtype, buckets: Sequence[ShampooBucket], **kind: bool
) -> tuple[MatrixPlan, Tiling]:
    tiling = tiling_of(device, dtype, buckets)
    stacked = [_is_stacked(bucket, tiling) for bucket in buckets]

    def build() -> MatrixPlan:
        return build_plan(buckets, stacked, dtype, tiling, device, **kind)

    key = (device, dtype, tiling, *stacked, *kind.values(), *[bucket.key for bucket in buckets])
    return kept_plan(_plans, key, build), tiling


def _launch(
    step: PreparedMatrices,
    numbers: Tensor,
    steps: Tensor | None,
    lr: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The launches of all buckets of a device and a GEMM dtype; numbers have an lr that is None."""
    launches = Launches(step, kind_of(lr, grad_scale, found_inf), numbers, found_inf)
    launch, multiply, elementwise = launches.launch, launches.multiply, launches.elementwise
    members = step.members.on_device()
    elementwise("scale", _scale_kernel, members, grad_scale)
    args = members, numbers, grad_scale, found_inf
    elementwise("momentum", _momentum_kernel, *args, maxnreg=MOMENTUM_REGISTERS)
    launch("transform", _transform_kernel, found_inf)
    multiply("transform")
    launch("grams", _grams_kernel, numbers, found_inf)
    launch("damped", _damped_kernel, numbers, found_inf)
    multiply("damped")
    launch("residuals", _residuals_kernel, found_inf)
    launch("squares", _squares_kernel, found_inf, finish=finish_square)
    launch("roots", _roots_kernel, found_inf, finish=finish_root)
    launch("inverses", _inverses_kernel, found_inf, finish=finish_inverse)
    launch("left", _directions_kernel)
    multiply("left")
    launch("directions", _directions_kernel, finish=finish_direction)
    elementwise("rows", _rows_kernel, members, numbers, steps, found_inf, BLOCK_M=ROWS)
    args = members, numbers, numbers if lr is None else lr, found_inf
    elementwise("descend", _descend_kernel, *args)
