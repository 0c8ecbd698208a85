"""The optimizers under test, and small problems for them."""

from __future__ import annotations

import inspect

import torch

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo, Sign

# For 1,000 steps on random gradients, where the defaults amplify every rounding.
TAME = {"damping": 1e-3, "factor_lr": 0.4}
# (class, settings): each body of each update once.
SETTINGS = {
    "rmsprop": (
        RootFreeRMSprop,
        {"lr": 0.05, "alpha": 0.9, "momentum": 0.0, "weight_decay": 0.1},
    ),
    "rmsprop-momentum": (RootFreeRMSprop, {"lr": 0.05, "alpha": 0.9, "momentum": 0.9}),
    "rmsprop-released": (
        RootFreeRMSprop,
        {
            "lr": 0.05,
            "alpha": 0.9,
            "momentum": 0.9,
            "weight_decay": 0.1,
            "weight_decay_mode": "momentum",
        },
    ),
    "adamw": (RootFreeAdamW, {"lr": 0.05}),
    "adamw-corrected": (RootFreeAdamW, {"lr": 0.05, "bias_correction": True}),
    "sign": (Sign, {"lr": 0.05, "weight_decay": 0.1}),
    "ifshampoo": (
        IFShampoo,
        {**TAME, "lr": 0.05, "weight_decay": 0.1, "factor_dtype": torch.bfloat16},
    ),
    "ifshampoo-interval": (
        IFShampoo,
        {
            **TAME,
            "lr": 0.05,
            "momentum": 0.0,
            "update_interval": 3,
            "factor_dtype": torch.float32,
        },
    ),
    "ifshampoo-axes": (
        IFShampoo,
        {
            **TAME,
            "lr": 0.05,
            "weight_decay": 0.1,
            "weight_decay_mode": "momentum",
            "merge_axes": False,
            "vector_method": "factor",
            "max_dense_dim": 5,
            "update_schedule": "log4",
            "update_interval": 4,
            "factor_dtype": torch.float32,
        },
    ),
    "shampoo": (
        RootFreeShampoo,
        {"lr": 0.05, "weight_decay": 0.1, "factor_dtype": torch.bfloat16},
    ),
    "shampoo-interval": (
        RootFreeShampoo,
        {
            "lr": 0.05,
            "update_interval": 3,
            "structures": ("diagonal", "dense"),
            "vector_method": "rootfree",
            "factor_dtype": torch.float32,
        },
    ),
}
# What not every class has.
OPTIONAL = ("batch_size", "initial_square_avg", "momentum", "damping")


def has(name, setting):
    return setting in inspect.signature(SETTINGS[name][0]).parameters


# Those to which the scale of a gradient matters.
SCALED = [name for name in SETTINGS if has(name, "batch_size")]
DIAGONAL = [name for name in SETTINGS if "shampoo" not in name]


def build(name, params, **overrides):
    cls, settings = SETTINGS[name]
    return cls(params, **accepted(name, {"batch_size": 8, **settings, **overrides}))


def accepted(name, values):
    """Of settings that other classes take too, those that this one has."""
    return {key: value for key, value in values.items() if key not in OPTIONAL or has(name, key)}


def parameters(*shapes, dtype=torch.float32, device="cpu", seed=0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]


def set_grads(params, seed):
    """Fresh random gradients, small enough that s moves well below 1."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.device, p.dtype)


def run(optimizer, params, steps, first=0):
    for t in range(first, first + steps):
        set_grads(params, seed=100 + t)
        optimizer.step()


def snapshot(optimizer, params):
    """Every bit that a step reads or writes, as a list of tensors."""
    tensors = [p.detach().clone() for p in params]
    for p in params:
        state = optimizer.state[p]
        tensors += [state[key].clone() for key in sorted(state)]
    return tensors


def assert_identical(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.device == e.device
        assert torch.equal(a, e)
