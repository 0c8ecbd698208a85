"""IF-Shampoo as a function on lists of tensors: all is checked, then the operator called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.matrix import largest_update
from .checks import check_hyperparameters, check_reachable, check_scaling, check_tensors
from .diagonal import WeightDecayMode
from .matrix_checks import check_buckets
from .overlap import check_written
from .schemas import as_scalar_tensor, mark_changed

UNDAMPED = "factors grow for ever where there is no gradient"


@torch.no_grad()
def ifshampoo_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    factor_momenta: Sequence[Tensor],
    products: Sequence[Tensor | None] | None = None,
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    axes: Sequence[int] | None = None,
    update_factors: bool = True,
    factor_lr: float = 0.8,
    factor_momentum: float = 0.5,
    damping: float = 3e-3,
    batch_size: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    weight_decay_mode: WeightDecayMode = "decoupled",
    max_update: float | None = 8.0,
    joint_norms: Sequence[bool] | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """IF-Shampoo on stacks of matrices, in place; see `reference.update_factors_`, `precondition`
    and `apply_` for the equations.

    Parameters of the same axes form a bucket, whose factors are stacked: those of 12 layers of
    1024 x 4096 are two tensors, of shape (12, 1024, 1024) and (12, 4096, 4096). The lists of
    factors, residuals, factor_momenta and products have one entry an axis, bucket by bucket; those
    of params, grads and momentum_buffers one a parameter, in the same order.

    Args:
        params: float64, float32, bfloat16 or float16 tensors of as many elements as the product of
            their bucket's axes, of any strides; updated.
        grads: one a parameter, of its shape; of its dtype, or float32. Never written.
        factors: K, contiguous, of shape (members, d, d), or (members, n, b, b) for n > 1 blocks, in
            bfloat16, float32 or float64, one dtype a bucket; or diagonal, of shape (members, d), in
            float32, or float64 beside float64. Multiples of the identity before the first step,
            zero in rows and columns of the last block beyond d. Updated.
        residuals: for a bfloat16 factor the 16 bits that it lacks to float32 (int16, of its
            shape, zeros before the first step; see `reference.split`), else None. Updated.
        factor_momenta: m, as factors, zeros before the first step. Updated.
        products: room for K K^T of each factor that is not diagonal, as it is, else None; kept
            between calls, it saves its product where `update_factors` is False, and must then be
            what the last call left. None makes it anew where it is needed.
        momentum_buffers: one a parameter, of its shape, float64 for float64 parameters and float32
            for all others, zeros before the first step; empty without momentum. Updated.
        lr: step size; a float, or a tensor of one number that is read on its device.
        axes: how many axes each bucket has; None means two each.
        update_factors: whether this step learns from the gradient, or preconditions alone.
        factor_lr: step size of the factors.
        factor_momentum: decay of m, in [0, 1).
        damping: weight of the identity, above 0, in the unit of a squared gradient times
            `batch_size`.
        batch_size: the number of loss terms that the gradients average.
        momentum: heavy-ball coefficient on the preconditioned gradient.
        weight_decay: per unit of lr.
        weight_decay_mode: "decoupled" or "momentum".
        max_update: bound of the entries of the preconditioned gradient, in units of
            1 / sqrt(batch_size damping); None means no bound.
        joint_norms: of each axis, whether all blocks of its factor are bounded by the norm of the
            whole m, as released, or each by its own; None means each.
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
        "factor_lr": factor_lr,
        "factor_momentum": factor_momentum,
        "damping": damping,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "weight_decay_mode": weight_decay_mode,
        "max_update": max_update,
        "maximize": maximize,
    }
    settings = check_hyperparameters(settings, UNDAMPED)
    params, grads, buffers = list(params), list(grads), list(momentum_buffers)
    if settings["momentum"] != 0 and params and not buffers:
        raise ValueError(
            f"momentum is {settings['momentum']} but momentum_buffers is empty; "
            "pass one tensor of zeros a parameter before the first step"
        )
    check_scaling(grad_scale, found_inf)
    check_tensors(params, grads, {"momentum_buffers": buffers} if buffers else {})
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    check_reachable(params, {"lr": settings["lr"], **scaling})
    axes = [2] * (len(factors) // 2) if axes is None else list(axes)
    per_axis: dict[str, list[Tensor | None]] = {
        "factors": list(factors),
        "residuals": list(residuals),
        "factor_momenta": list(factor_momenta),
        "products": [None] * len(factors) if products is None else list(products),
    }
    check_buckets(params, axes, per_axis, products_are_given=products is not None)
    if joint_norms is not None and len(joint_norms) != len(factors):
        raise ValueError(
            f"joint_norms has {len(joint_norms)} entries but factors has {len(factors)}; pass one "
            "an axis, or None"
        )
    written: dict[str, Sequence[Tensor | None]] = {"momentum_buffers": buffers, **per_axis}
    check_lists_written(params, grads, written)

    if products is None:
        per_axis["products"] = room_for_products(per_axis["factors"])
    torch.ops.rootfree_fused.ifshampoo_(
        params,
        grads,
        *(
            [factors[i].new_empty(0) if t is None else t for i, t in enumerate(tensors)]
            for tensors in per_axis.values()
        ),
        buffers,
        as_scalar_tensor(settings["lr"]),
        axes=axes,
        update_factors=bool(update_factors),
        refresh_products=products is None,
        factor_lr=settings["factor_lr"],
        factor_momentum=settings["factor_momentum"],
        damping=settings["damping"],
        batch_size=float(settings["batch_size"]),
        bound=largest_update(*(settings[k] for k in ("max_update", "batch_size", "damping"))),
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        decoupled=settings["weight_decay_mode"] == "decoupled",
        maximize=settings["maximize"],
        joint_norms=None if joint_norms is None else list(map(bool, joint_norms)),
        **scaling,
    )
    mark_changed(params)


def room_for_products(factors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For K K^T: the Triton kernels apply it alone; on the CPU K^T then K cost as little."""
    return [
        torch.empty_like(f) if f is not None and f.is_cuda and f.dim() > 2 else None
        for f in factors
    ]


def check_lists_written(
    params: list[Tensor],
    grads: list[Tensor],
    written: Mapping[str, Sequence[Tensor | None]],
) -> None:
    """Raise a ValueError for memory that a call may not write, or would twice."""
    check_written(
        (f"{name}[{i}]", tensor, name != "grads")
        for name, tensors in {"params": params, "grads": grads, **written}.items()
        for i, tensor in enumerate(tensors)
        if tensor is not None
    )
