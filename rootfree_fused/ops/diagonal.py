"""The diagonal updates on lists of tensors: all is checked, then the operator called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import square_weights
from .checks import (
    LARGEST,
    check_hyperparameters,
    check_reachable,
    check_scaling,
    check_steps,
    check_sums,
    check_tensors,
)
from .methods import ADAMW, RMSPROP, DiagonalMethod
from .overlap import check_written
from .schemas import as_scalar_tensor, mark_changed

WeightDecayMode = Literal["decoupled", "momentum"]
SecondMoment = Literal["batch", "micro", "variance", "mean"]


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
    squares: Sequence[Tensor] = (),
    second_moment: SecondMoment = "batch",
    micro_batches: int = 1,
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
        squares: of micro-batches, as `accumulate_` adds them up in `parts`, for a `second_moment`
            other than "batch", which takes none: as the second moments, never written. `grads` are
            then the sums, and `grad_scale` the sum of the weights.
        second_moment: what s follows, see `reference.square_weights`.
        micro_batches: how many were added up; "variance" and "mean" need two.
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
    parts = _weighted(squares, second_moment, micro_batches)
    run_(RMSPROP, params, grads, states, settings, scaling, None, parts)


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
    squares: Sequence[Tensor] = (),
    second_moment: SecondMoment = "batch",
    micro_batches: int = 1,
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
        squares: of micro-batches, as `accumulate_` adds them up in `parts`, for a `second_moment`
            other than "batch", which takes none: as the second moments, never written. `grads` are
            then the sums, and `grad_scale` the sum of the weights.
        second_moment: what s follows, see `reference.square_weights`.
        micro_batches: how many were added up; "variance" and "mean" need two.
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
    parts = _weighted(squares, second_moment, micro_batches)
    run_(ADAMW, params, grads, states, settings, scaling, steps, parts)


@torch.no_grad()
def accumulate_(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    parts: Sequence[Tensor] = (),
    *,
    weight: float = 1.0,
    signs: bool = False,
    first: bool = False,
) -> None:
    """Add a micro-batch's gradients to sums, in place; see `reference.accumulate_`.

    Args:
        sums: float32 or float64 tensors of any shapes and strides; updated.
        grads: one a sum, of its shape: float32, of a float32 sum bfloat16 or float16, of a float64
            sum float64. Never written.
        parts: empty, or one a sum, of its shape and dtype: the sums of (weight g)^2, or with
            `signs` of weight sign(g). Updated.
        weight: by which the micro-batch counts: 1, or its number of loss terms.
        signs: what `parts` sum.
        first: whether what sums and parts held is overwritten.

    Raises:
        ValueError: lists of unequal lengths, unequal shapes or devices, a weight out of range.
        TypeError: a dtype or layout that is not supported.
    """
    sums, grads, parts = list(sums), list(grads), list(parts)
    if isinstance(weight, bool) or not 0 < weight <= LARGEST:
        raise ValueError(f"weight is {weight!r}; pass a number > 0 that is finite in float32")
    check_sums(sums, grads, {"parts": parts} if parts else {})
    check_written(
        (f"{name}[{i}]", tensor, name != "grads")
        for name, tensors in {"sums": sums, "grads": grads, "parts": parts}.items()
        for i, tensor in enumerate(tensors)
    )
    torch.ops.rootfree_fused.accumulate_(
        sums, parts, grads, weight=float(weight), signs=signs, first=first
    )


def _weighted(
    squares: Sequence[Tensor], second_moment: str, micro_batches: int
) -> tuple[list[Tensor], dict[str, float]]:
    """The squares, and what an operator makes of them, after a check of both."""
    check_hyperparameters({"second_moment": second_moment})
    least = 2 if second_moment in ("variance", "mean") else 1
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int):
        raise TypeError(f"micro_batches is {micro_batches!r}; pass a whole number")
    if micro_batches < least:
        raise ValueError(
            f"micro_batches is {micro_batches}; second_moment={second_moment!r} needs at least "
            f"{least}"
        )
    if bool(squares) != (second_moment != "batch"):
        raise ValueError(
            f"second_moment is {second_moment!r} and squares has {len(squares)} tensors; pass one "
            "a parameter for any but 'batch', and none for that"
        )
    weights = square_weights(second_moment, micro_batches)
    named = zip(RMSPROP.weights, weights, strict=True)
    return list(squares), dict(named)


def run_(
    method: DiagonalMethod,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    settings: dict[str, Any],
    scaling: dict[str, Tensor | None],
    steps: Tensor | None,
    parts: tuple[list[Tensor], dict[str, float]],
) -> None:
    """One step of a diagonal method on lists, after a check of everything.

    states: by the names of the lists, in the method's order. settings: as groups have them, all
    that the method takes. steps: for a method that `counts`. parts: of micro-batches, with what
    weighs them, for a method that takes any.
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
    of_parts, weights = parts
    check_tensors(params, grads, {**given, "squares": of_parts} if of_parts else given)
    check_reachable(params, {"lr": settings["lr"], "steps": steps, **scaling})
    check_written(
        (f"{name}[{i}]", tensor, name not in ("grads", "squares"))
        for name, tensors in {
            "params": params,
            "grads": grads,
            **given,
            "squares": of_parts,
        }.items()
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
        **({"parts": of_parts, **weights} if of_parts else {}),
        batch_size=as_scalar_tensor(settings["batch_size"]),
        **scaling,
    )
    mark_changed(params)
