"""Root-free Shampoo as a function on lists of tensors: all is checked, then the operator called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import known_sizes
from .checks import (
    check_hyperparameters,
    check_reachable,
    check_scaling,
    check_steps,
    check_switches,
    check_tensors,
    state_dtype,
)
from .matrix import check_lists_written, room_for_products
from .matrix_checks import check_buckets
from .schemas import as_scalar_tensor, mark_changed

UNDAMPED = "nothing else bounds the inverse of S where gradients are of low rank"


@torch.no_grad()
def rootfree_shampoo_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    row_square_avgs: Sequence[Tensor],
    grams: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    products: Sequence[Tensor | None] | None = None,
    *,
    steps: Tensor,
    lr: float | Tensor,
    update_factors: bool = True,
    betas: tuple[float, float] = (0.9, 0.95),
    damping: float = 0.1,
    weight_decay: float = 0.0,
    update_rms: float = 0.3,
    row_beta: float | None = 0.95,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Root-free Shampoo on stacks of matrices, in place; see `reference.rootfree_shampoo_` for the
    equations and `reference.start_values` for where grams and factors start.

    Parameters that are matrices of the same sizes (m, n) form a bucket, whose grams and factors are
    stacked: those of 12 layers of 1024 x 4096 are two tensors each, of shape (12, 1024, 1024) and
    (12, 4096, 4096). The lists of grams, factors, residuals and products have two entries a bucket,
    of the rows and of the columns; the others one a parameter, in the same order.

    Args:
        params: float64, float32, bfloat16 or float16 tensors of m n elements, whose axes merge into
            (m, n), of any strides; updated.
        grads: one a parameter, of its shape; of its dtype, or float32. Never written.
        momentum_buffers: M, one a parameter, of its shape, float64 for float64 parameters and
            float32 for all others, zeros before the first step. Updated.
        row_square_avgs: v, one a parameter, of shape (m,), as momentum_buffers; empty where
            row_beta is None. Updated.
        grams: S, contiguous, of the factors' shapes;
            float64 where the factors of the bucket are, else float32. Updated.
        factors: K, contiguous, of shape (members, d, d), or (members, n, b, b) for n > 1 blocks, in
            bfloat16, float32 or float64, one dtype a bucket; or diagonal, of shape (members, d), in
            float32, or float64 beside float64. Zero, as S, in rows and columns of the last block
            beyond d. Updated.
        residuals: for a bfloat16 factor the 16 bits that it lacks to float32 (int16, of its
            shape; see `reference.split`), else None. Updated.
        products: room for K K^T of each factor that is not diagonal, as it is, else None; kept
            between calls, it saves its product where `update_factors` is False, and must then be
            what the last call left. None makes it anew where it is needed.
        steps: float32, shape (len(params),): how many steps each parameter has taken, this one
            counted.
        lr: step size; a float, or a tensor of one number that is read on its device.
        update_factors: whether this step learns from the gradient, or preconditions alone.
        betas: decay of M and of S, each in [0, 1).
        damping: weight of the identity in units of the mean of S's diagonal, above 0.
        weight_decay: decoupled, per unit of lr.
        update_rms: root mean square of the update of a 256 x 256 matrix, above 0; of one of (m, n)
            it is `reference.shape_scale` times that.
        row_beta: decay of v, in [0, 1); None leaves the rows of the update as they are.
        maximize: ascend instead of descend.
        grad_scale: what the gradients were multiplied by: one float32 or float64, read on its
            device. None means 1.
        found_inf: not 0 to leave everything as it is; as `grad_scale`. None means 0.

    Raises:
        ValueError: lists of unequal lengths, shapes or devices that do not fit, values out of
            range.
        TypeError: a dtype or layout that is not supported.
    """
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "damping": damping,
        "weight_decay": weight_decay,
        "update_rms": update_rms,
        "row_beta": row_beta,
        "maximize": maximize,
    }
    settings = check_hyperparameters(settings, UNDAMPED)
    check_switches(update_factors=update_factors)
    params, grads, buffers = list(params), list(grads), list(momentum_buffers)
    rows, scaling = list(row_square_avgs), {"grad_scale": grad_scale, "found_inf": found_inf}
    check_scaling(grad_scale, found_inf)
    check_tensors(params, grads, {"momentum_buffers": buffers})
    check_reachable(params, {"lr": settings["lr"], "steps": steps, **scaling})
    check_steps(steps, len(params))
    per_axis: dict[str, list[Tensor | None]] = {
        "factors": list(factors),
        "residuals": list(residuals),
        "grams": list(grams),
    }
    stacks = per_axis["factors"]
    per_axis["products"] = [None] * len(stacks) if products is None else list(products)
    check_buckets(
        params, [2] * (len(stacks) // 2), per_axis, products_are_given=products is not None
    )
    _check_rows(params, rows, stacks, row_beta)
    written: dict[str, Sequence[Tensor | None]] = {
        "momentum_buffers": buffers,
        "row_square_avgs": rows,
        **per_axis,
    }
    check_lists_written(params, grads, written)

    if products is None:
        per_axis["products"] = room_for_products(stacks)
    dense = [factor for factor in stacks if factor is not None]
    torch.ops.rootfree_fused.rootfree_shampoo_(
        params,
        grads,
        buffers,
        rows,
        *(
            [dense[i].new_empty(0) if t is None else t for i, t in enumerate(per_axis[name])]
            for name in ("grams", "factors", "residuals", "products")
        ),
        steps,
        as_scalar_tensor(settings["lr"]),
        update_factors=update_factors,
        refresh_products=products is None,
        beta1=settings["betas"][0],
        beta2=settings["betas"][1],
        damping=settings["damping"],
        weight_decay=settings["weight_decay"],
        update_rms=settings["update_rms"],
        row_beta=settings["row_beta"],
        maximize=settings["maximize"],
        **scaling,
    )
    mark_changed(params)


def _check_rows(
    params: list[Tensor],
    rows: list[Tensor],
    factors: list[Tensor | None],
    row_beta: float | None,
) -> None:
    if row_beta is None:
        if rows:
            raise ValueError(
                f"row_beta is None but row_square_avgs has {len(rows)} tensors; pass an empty list"
            )
        return
    if len(rows) != len(params):
        raise ValueError(
            f"row_square_avgs has {len(rows)} tensors but params has {len(params)}; pass one a "
            "parameter, or row_beta=None"
        )
    stacks = [factor for factor in factors if factor is not None]
    pairs = [stacks[i : i + 2] for i in range(0, len(stacks), 2)]
    owners = [pair for pair in pairs for _ in range(len(pair[0]))]
    sizes = [known_sizes(param, own)[0] for param, own in zip(params, owners, strict=True)]
    for i, (param, row, size) in enumerate(zip(params, rows, sizes, strict=True)):
        needed = (state_dtype(param), (size,), param.device)
        if not isinstance(row, Tensor) or (row.dtype, tuple(row.shape), row.device) != needed:
            found = f"{row.dtype}, {tuple(row.shape)}" if isinstance(row, Tensor) else repr(row)
            raise ValueError(
                f"row_square_avgs[{i}] is {found} but params[{i}] needs {needed[0]}, {needed[1]} "
                f"on {needed[2]}"
            )
        if not row.is_contiguous():
            raise ValueError(f"row_square_avgs[{i}] is not contiguous; pass .contiguous()")
