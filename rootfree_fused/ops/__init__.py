"""The fused updates as functions on lists of tensors: schemas, input checks, dispatch.

PyTorch's dispatcher chooses the body: C++ on the CPU (csrc/), Triton on CUDA (kernels/), and the
specification (reference/) on every other device and wherever one of the two is missing.
`backends()` says what runs on each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from . import dispatch
from .checks import (
    check_hyperparameters,
    check_reachable,
    check_scaling,
    check_steps,
    check_tensors,
)
from .overlap import check_apart

WeightDecayMode = Literal["decoupled", "momentum"]

# lr and batch_size are 0-d tensors, so that a compiled step needs no recompile for other values.
_library = torch.library.Library("rootfree_fused", "DEF")
_library.define(
    "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, "
    "Tensor(c!)[] momentum_buffers, Tensor lr, *, float alpha, float damping, "
    "float weight_decay, float momentum, Tensor batch_size, bool decoupled, bool maximize, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
_library.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor? steps, Tensor lr, *, float beta1, float beta2, "
    "float damping, float weight_decay, Tensor batch_size, bool maximize, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
_library.define(
    "ifshampoo_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] factors, "
    "Tensor(c!)[] residuals, Tensor(d!)[] factor_momenta, Tensor(e!)[] products, "
    "Tensor(f!)[] momentum_buffers, Tensor lr, *, int[] axes, bool update_factors, "
    "bool refresh_products, float factor_lr, float factor_momentum, float damping, "
    "float batch_size, float momentum, float weight_decay, bool decoupled, bool maximize, "
    "float? bound=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)


# Public functions -----------------------------------------------------------------------------


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
        lr: step size; a float, or a 0-d tensor that is read on its device.
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
    settings = check_hyperparameters(
        {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "batch_size": batch_size,
            "weight_decay_mode": weight_decay_mode,
            "maximize": maximize,
        }
    )
    params, grads, square_avgs, momentum_buffers = map(
        list, (params, grads, square_avgs, momentum_buffers)
    )
    states = {"square_avgs": square_avgs}
    if momentum_buffers:
        states["momentum_buffers"] = momentum_buffers
    elif settings["momentum"] != 0 and params:
        raise ValueError(
            f"momentum is {settings['momentum']} but momentum_buffers is empty; "
            "pass one tensor of zeros a parameter before the first step"
        )
    _check_lists(params, grads, states, lr=lr, grad_scale=grad_scale, found_inf=found_inf)
    torch.ops.rootfree_fused.rmsprop_(
        params,
        grads,
        square_avgs,
        momentum_buffers,
        as_scalar_tensor(settings["lr"]),
        alpha=settings["alpha"],
        damping=settings["damping"],
        weight_decay=settings["weight_decay"],
        momentum=settings["momentum"],
        batch_size=as_scalar_tensor(settings["batch_size"]),
        decoupled=weight_decay_mode == "decoupled",
        maximize=settings["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    mark_changed(params)


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
        lr: step size; a float, or a 0-d tensor that is read on its device.
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
    settings = check_hyperparameters(
        {
            "lr": lr,
            "betas": betas,
            "damping": damping,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "maximize": maximize,
        }
    )
    params, grads, exp_avgs, exp_avg_sqs = map(list, (params, grads, exp_avgs, exp_avg_sqs))
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    _check_lists(params, grads, states, lr=lr, steps=steps, **scaling)
    if steps is not None:
        check_steps(steps, len(params))
    torch.ops.rootfree_fused.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        as_scalar_tensor(settings["lr"]),
        beta1=settings["betas"][0],
        beta2=settings["betas"][1],
        damping=settings["damping"],
        weight_decay=settings["weight_decay"],
        batch_size=as_scalar_tensor(settings["batch_size"]),
        maximize=settings["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    mark_changed(params)


def _check_lists(
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **values: object,
) -> None:
    check_scaling(grad_scale, found_inf)
    check_tensors(params, grads, states)
    check_reachable(params, {**values, "grad_scale": grad_scale, "found_inf": found_inf})
    lists = {"params": params, "grads": grads, **states}
    check_apart(
        (f"{name}[{i}]", tensor, name != "grads")
        for name, tensors in lists.items()
        for i, tensor in enumerate(tensors)
    )


def backends() -> dict[str, str]:
    """What runs on each device, for example {"cpu": "C++ (avx512)", "cuda": "Triton 3.6.0"}."""
    return dispatch.backends()


def launcher(params: list[Tensor]) -> Any:
    """The kernels that a step on all these parameters may launch directly, or None."""
    return dispatch.launcher(params)


def matrix_kernel(params: list[Tensor], residuals: list[Tensor]) -> Any:
    """What a step may call for a bucket instead of `ifshampoo_`, which would look for it, or None.

    It takes contiguous tensors, no `axes` and no scaler's tensors. residuals: one an axis.
    """
    return dispatch.matrix_kernel(params, residuals)


def captured_tables() -> AbstractContextManager[list[Tensor]]:
    """A list, within, of what kernels read that are captured: the graph's owner keeps it."""
    return dispatch.captured_tables()


def as_scalar_tensor(value: float | Tensor) -> Tensor:
    """A number as the 0-d float32 or float64 tensor that the operators take."""
    if isinstance(value, Tensor):
        value = value.detach().reshape(())
        return value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def mark_changed(params: Sequence[Tensor]) -> None:
    """Tell autograd that an operator wrote the parameters, so that a stale backward raises."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)


dispatch.register(_library)
