"""Whole optimizers by the specification: slow, one parameter at a time, in any float dtype."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from helpers.tensor_cores import float32_products

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeShampoo, Sign, reference
from rootfree_fused.optimizer.layouts import layout_of

COMMON = ("lr", "damping", "weight_decay", "batch_size")


def start(cls, param, group, dtype):
    """The state that a parameter has before its first step."""
    state = {"step": torch.zeros(())}
    if cls is RootFreeShampoo:
        return {**state, **_shampoo_start(param, group, dtype)}
    if cls is Sign:
        return {**state, "exp_avg": torch.zeros_like(param, dtype=dtype)}
    layout = layout_of(param.shape, group) if cls is IFShampoo else None
    square = 0.0 if group["initial_square_avg"] == "auto" else group["initial_square_avg"]
    if cls is RootFreeAdamW:
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.full_like(param, square, dtype=dtype)
    elif layout is None:
        state["square_avg"] = torch.full_like(param, square, dtype=dtype)
    else:
        scale = square and square ** (-1 / (2 * len(layout.sizes)))
        for n, axis in enumerate(zip(layout.structures, layout.sizes, strict=True)):
            state[f"factor_{n}"] = times_identity(scale, *axis, dtype)
            state[f"factor_momentum_{n}"] = torch.zeros_like(state[f"factor_{n}"])
    return state


def _shampoo_start(param, group, dtype):
    zeros = torch.zeros_like(param, dtype=dtype)
    if (layout := layout_of(param.shape, group)) is None:
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state = {"momentum_buffer": zeros, "row_square_avg": torch.zeros(layout.sizes[0], dtype=dtype)}
    axes = zip(layout.structures, layout.sizes, strict=True)
    starts = reference.start_values(group["damping"])
    for n, (axis, values) in enumerate(zip(axes, starts, strict=True)):
        for key, value in zip((f"gram_{n}", f"factor_{n}"), values, strict=True):
            state[key] = times_identity(value, *axis, dtype)
    return state


def times_identity(value, structure, size, dtype):
    factor = torch.zeros(structure.shape(size), dtype=dtype)
    structure.add_identity_(factor, value, size)
    return factor


def start_(grad, state, group, layout):
    """Give state that waits for a gradient the scale of this one."""
    second = [v for k, v in state.items() if k in ("square_avg", "exp_avg_sq", "factor_0")]
    square = reference.mean_square(grad, group["batch_size"])
    if group["initial_square_avg"] != "auto" or second[0].any() or not 0 < square < math.inf:
        return
    if layout is None:
        second[0].fill_(square.item())
        return
    scale = reference.initial_scale(square, group["damping"], len(layout.sizes))
    for n, axis in enumerate(zip(layout.structures, layout.sizes, strict=True)):
        factor = state[f"factor_{n}"]
        factor.copy_(times_identity(scale, *axis, factor.dtype))


def step_(cls, param, grad, state, group):
    """One step on one parameter; a state without momentum_buffer has no momentum."""
    state["step"] += 1
    if cls is RootFreeShampoo:
        _shampoo_step_(param, grad, state, group)
        return
    if cls is Sign:
        own = {key: group[key] for key in ("lr", "beta", "weight_decay", "maximize")}
        last = group["sign"] == "ema"
        reference.sign_(param, grad, state["exp_avg"], sign_last=last, **own)
        return
    layout = layout_of(param.shape, group) if cls is IFShampoo else None
    start_(grad, state, group, layout)
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
    sizes, structures = layout.sizes, {"structures": layout.structures}
    factors, momenta = (
        [state[f"{key}_{n}"] for n in range(len(sizes))] for key in ("factor", "factor_momentum")
    )
    g = (-grad if group["maximize"] else grad).reshape(sizes)
    when = int(state["step"]) - 1, group["update_interval"], group["update_schedule"]
    if reference.is_update_step(*when):
        own = ("factor_lr", "factor_momentum", "damping", "batch_size")
        settings = {key: group[key] for key in own}
        reference.update_factors_(g, factors, momenta, **settings, **structures)
    update = reference.precondition(g, factors, **structures).reshape(param.shape)
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
    sizes = layout_of(param.shape, group).sizes
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
    layout = layout_of(param.shape, group) if cls in (IFShampoo, RootFreeShampoo) else None
    is_matrix = layout is not None and len(layout.sizes) == 2
    with float32_products(param.device) if is_matrix else nullcontext():
        step_(cls, after["param"], copied(param.grad), after, group)
    return after
