"""Whole optimizers by the specification: slow, one parameter at a time, in any float dtype."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import torch
from helpers.tensor_cores import float32_products

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeShampoo, reference

COMMON = ("lr", "damping", "weight_decay", "batch_size")


def axes_of(shape, group):
    """Sizes of a parameter's axes and which are dense, or None where it has no factors."""
    sizes = [d for d in shape if d != 1] or [1]
    if 0 in sizes or (len(sizes) == 1 and group["vector_method"] != "factor"):
        return None
    if group.get("merge_axes", True) and len(sizes) > 2:
        sizes = [sizes[0], math.prod(sizes[1:])]
    return sizes, [group["structures"] == "auto" and d <= group["max_dense_dim"] for d in sizes]


def start(cls, param, group, dtype):
    """The state that a parameter has before its first step."""
    state = {"step": torch.zeros(())}
    if cls is RootFreeShampoo:
        return {**state, **_shampoo_start(param, group, dtype)}
    axes = axes_of(param.shape, group) if cls is IFShampoo else None
    square = 0.0 if group["initial_square_avg"] == "auto" else group["initial_square_avg"]
    if cls is RootFreeAdamW:
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.full_like(param, square, dtype=dtype)
    elif axes is None:
        state["square_avg"] = torch.full_like(param, square, dtype=dtype)
    else:
        scale = square and square ** (-1 / (2 * len(axes[0])))
        for n, (size, dense) in enumerate(zip(*axes, strict=True)):
            diagonal = torch.full((size,), scale, dtype=dtype)
            state[f"factor_{n}"] = diagonal.diag() if dense else diagonal
            state[f"factor_momentum_{n}"] = torch.zeros_like(state[f"factor_{n}"])
    return state


def _shampoo_start(param, group, dtype):
    zeros = torch.zeros_like(param, dtype=dtype)
    if (axes := axes_of(param.shape, group)) is None:
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state = {"momentum_buffer": zeros, "row_square_avg": torch.zeros(axes[0][0], dtype=dtype)}
    starts = reference.start_values(group["damping"])
    for n, (size, dense, values) in enumerate(zip(*axes, starts, strict=True)):
        for key, value in zip((f"gram_{n}", f"factor_{n}"), values, strict=True):
            diagonal = torch.full((size,), value, dtype=dtype)
            state[key] = diagonal.diag() if dense else diagonal
    return state


def start_(grad, state, group):
    """Give state that waits for a gradient the scale of this one."""
    second = [v for k, v in state.items() if k in ("square_avg", "exp_avg_sq", "factor_0")]
    square = reference.mean_square(grad, group["batch_size"])
    if group["initial_square_avg"] != "auto" or second[0].any() or not 0 < square < math.inf:
        return
    factors = [v for k, v in state.items() if re.fullmatch(r"factor_\d+", k)]
    scale = reference.initial_scale(square, group["damping"], len(factors) or 1)
    for factor in factors:
        (factor.diagonal() if factor.dim() > 1 else factor).fill_(scale)
    if not factors:
        second[0].fill_(square.item())


def step_(cls, param, grad, state, group):
    """One step on one parameter; a state without momentum_buffer has no momentum."""
    state["step"] += 1
    if cls is RootFreeShampoo:
        _shampoo_step_(param, grad, state, group)
        return
    start_(grad, state, group)
    sign = {"maximize": group["maximize"]}
    common = {key: group[key] for key in COMMON}
    if cls is RootFreeAdamW:
        beta1, beta2 = group["betas"]
        count = state["step"] if group["bias_correction"] else None
        averages = state["exp_avg"], state["exp_avg_sq"]
        reference.adamw_(param, grad, *averages, count, beta1=beta1, beta2=beta2, **sign, **common)
        return
    buffer = state.get("momentum_buffer")
    decoupled = {"decoupled": group["weight_decay_mode"] == "decoupled"}
    momentum = {"momentum": group["momentum"]}
    if "square_avg" in state:
        alpha = {"alpha": group["alpha"], **sign, **momentum, **decoupled}
        reference.rmsprop_(param, grad, state["square_avg"], buffer, **alpha, **common)
        return
    sizes, _ = axes_of(param.shape, group)
    factors, momenta = (
        [state[f"{key}_{n}"] for n in range(len(sizes))] for key in ("factor", "factor_momentum")
    )
    g = (-grad if group["maximize"] else grad).reshape(sizes)
    when = int(state["step"]) - 1, group["update_interval"], group["update_schedule"]
    if reference.is_update_step(*when):
        own = ("factor_lr", "factor_momentum", "damping", "batch_size")
        reference.update_factors_(g, factors, momenta, **{key: group[key] for key in own})
    update = reference.precondition(g, factors).reshape(param.shape)
    step = {key: group[key] for key in ("lr", "weight_decay")}
    reference.apply_(param, update, buffer, **step, **momentum, **decoupled)


def _shampoo_step_(param, grad, state, group):
    beta1, beta2 = group["betas"]
    common = {key: group[key] for key in ("lr", "weight_decay", "maximize")}
    common["beta1"] = beta1
    if "exp_avg" in state:
        vector = {
            "adam": (reference.vector_adam_, "vector_rms"),
            "rootfree": (reference.vector_rootfree_, "update_rms"),
        }
        update_, rms = vector[group["vector_method"]]
        own = {key: group[key] for key in ("vector_beta2", rms)}
        averages = state["exp_avg"], state["exp_avg_sq"]
        update_(param, grad, *averages, state["step"], **own, **common)
        return
    sizes, _ = axes_of(param.shape, group)
    momentum = state["momentum_buffer"].reshape(sizes).clone()
    lists = [[state[f"{key}_{n}"] for n in range(2)] for key in ("gram", "factor")]
    own = {key: group[key] for key in ("damping", "update_rms", "row_beta")}
    updates = (int(state["step"]) - 1) % group["update_interval"] == 0
    reference.rootfree_shampoo_(
        *(param, grad.reshape(sizes), momentum, *lists, state["row_square_avg"]),
        int(state["step"]),
        **common,
        **own,
        beta2=beta2,
        update_factors=updates,
    )
    state["momentum_buffer"].copy_(momentum.view(param.shape))


def stepped(cls, param, state, group, dtype=None):
    """Copies of a parameter and its state after one step, in their own dtypes or in another.

    float32 products of a matrix are those of its device's kernels.
    """

    def copied(tensor):
        return tensor.detach().to(dtype or tensor.dtype, copy=True)

    after = {key: v.clone() if key == "step" else copied(v) for key, v in state.items()}
    after["param"] = copied(param)
    axes = axes_of(param.shape, group) if cls in (IFShampoo, RootFreeShampoo) else None
    is_matrix = axes is not None and len(axes[0]) == 2
    with float32_products(param.device) if is_matrix else nullcontext():
        step_(cls, after["param"], copied(param.grad), after, group)
    return after
