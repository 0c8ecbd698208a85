"""The diagonal updates on lists of tensors: all is checked, then the operator called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import (
    check_hyperparameters,
    check_reachable,
    check_scaling,
    check_steps,
    check_tensors,
)
from .methods import ADAMW, RMSPROP, DiagonalMethod
from .overlap import check_written
from .schemas import as_scalar_tensor, mark_changed

WeightDecayMode = Literal["decoupled", "momentum"]


@torch.no_grad()
def rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    alpha: float = 0.99,
    damping: float = 1e-4,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    batch_size: float,
    weight_decay_mode: WeightDecayMode = "decoupled",
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Root-free RMSProp on lists of tensors, in place; see `reference.rmsprop_` for the equations.

    Args:
        params: float64, float32, bfloat16 or float16 tensors of any shapes and strides; updated.
        grads: one a parameter, of its shape; of its dtype, or float32. Never written.
        square_avgs: s, one a parameter, of its shape; float64 for float64 parameters and float32
            for all others; ones before the first step. Updated.
        momentum_buffers: as `square_avgs`, zeros before the first step; empty without momentum.
        lr: step size; a float, or a tensor of one number that is read on its device.
        alpha: decay of s, in [0, 1].
        damping: added to s, in the unit of a squared gradient times `batch_size`.
        weight_decay: per unit of lr.
        momentum: heavy-ball coefficient.
        batch_size: the number of loss terms that the gradients average.
        weight_decay_mode: "decoupled" shrinks the parameter; "momentum" adds weight_decay * param
            to what enters the momentum buffer, as the paper's released code does.
        maximize: ascend instead of descend.
        grad_scale: what the gradients were multiplied by: one float32 or float64, read on its
            device. None means 1.
        found_inf: not 0 to leave everything as it is; as `grad_scale`. None means 0.

    Raises:
        ValueError: lists of unequal lengths, unequal shapes or devices, values out of range.
        TypeError: a dtype or layout that is not supported.
    """
    settings = {
        "lr": lr,
        "alpha": alpha,
        "damping": damping,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "batch_size": batch_size,
        "weight_decay_mode": weight_decay_mode,
        "maximize": maximize,
    }
    states = {"square_avgs": square_avgs, "momentum_buffers": momentum_buffers}
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    run_(RMSPROP, params, grads, states, settings, scaling)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    damping: float = 1e-4,
    weight_decay: float = 1e-2,
    batch_size: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Root-free AdamW on lists of tensors, in place; see `reference.adamw_` for the equations.

    Args:
        params: float64, float32, bfloat16 or float16 tensors of any shapes and strides; updated.
        grads: one a parameter, of its shape; of its dtype, or float32. Never written.
        exp_avgs: one a parameter, of its shape; float64 for float64 parameters and float32 for all
            others; zeros before the first step. Updated.
        exp_avg_sqs: s, as `exp_avgs`; ones before the first step. Updated.
        steps: float32, shape (len(params),): how many steps each parameter has taken, this one
            counted. None means no bias correction.
        lr: step size; a float, or a tensor of one number that is read on its device.
        betas: decay of the gradient's average and of s, each in [0, 1).
        damping: added to s, in the unit of a squared gradient times `batch_size`.
        weight_decay: decoupled, per unit of lr.
        batch_size: the number of loss terms that the gradients average.
        maximize: ascend instead of descend.
        grad_scale: what the gradients were multiplied by: one float32 or float64, read on its
            device. None means 1.
        found_inf: not 0 to leave everything as it is; as `grad_scale`. None means 0.

    Raises:
        ValueError: lists of unequal lengths, unequal shapes or devices, values out of range.
        TypeError: a dtype or layout that is not supported.
    """
    settings = {
        "lr": lr,
        "betas": betas,
        "damping": damping,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "maximize": maximize,
    }
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    run_(ADAMW, params, grads, states, settings, scaling, steps)


def run_(
    method: DiagonalMethod,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    settings: dict[str, Any],
    scaling: dict[str, Tensor | None],
    steps: Tensor | None = None,
) -> None:
    """One step of a diagonal method on lists, after a check of everything.

    states: by the names of the lists, in the method's order. settings: as groups have them, all
    that the method takes. steps: for a method that `counts`.
    """
    settings = check_hyperparameters(settings)
    params, grads = list(params), list(grads)
    lists = {name: list(tensors) for name, tensors in states.items()}
    if not lists.get("momentum_buffers", True):
        if settings["momentum"] != 0 and params:
            raise ValueError(
                f"momentum is {settings['momentum']} but momentum_buffers is empty; "
                "pass one tensor of zeros a parameter before the first step"
            )
        given = {name: tensors for name, tensors in lists.items() if name != "momentum_buffers"}
    else:
        given = lists
    check_scaling(**scaling)
    check_tensors(params, grads, given)
    check_reachable(params, {"lr": settings["lr"], "steps": steps, **scaling})
    check_written(
        (f"{name}[{i}]", tensor, name != "grads")
        for name, tensors in {"params": params, "grads": grads, **given}.items()
        for i, tensor in enumerate(tensors)
    )
    if steps is not None:
        check_steps(steps, len(params))
    getattr(torch.ops.rootfree_fused, method.name)(
        params,
        grads,
        *lists.values(),
        *([steps] if method.counts else []),
        as_scalar_tensor(settings["lr"]),
        **method.settings(settings),
        batch_size=as_scalar_tensor(settings["batch_size"]),
        **scaling,
    )
    mark_changed(params)
