"""Calls of ops.rootfree_shampoo_ before their first step."""

from __future__ import annotations

import torch
from helpers.comparison import assert_bits_equal

from rootfree_fused import ops, reference

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SETTINGS = {
    "lr": 0.05,
    "betas": (0.8, 0.9),
    "damping": 0.05,
    "weight_decay": 0.1,
    "update_rms": 0.3,
    "row_beta": 0.9,
}
# (members, shape of the parameters, sizes of the bucket's axes, whether each has a dense factor)
BUCKETS = [
    (2, (6, 4), (6, 4), (True, True)),
    (1, (4, 2, 3), (4, 6), (True, False)),
    (2, (5, 3), (5, 3), (False, False)),
]
WRITTEN = (
    "params",
    "momentum_buffers",
    "row_square_avgs",
    "grams",
    "factors",
    "residuals",
    "products",
)


def lists(dtype=F64, device="cpu", buckets=BUCKETS):
    """The lists of a call before the first step, in the order of the function's arguments."""
    tensors = {name: [] for name in ("params", "grads", "momentum_buffers", "row_square_avgs")}
    per_axis = {"grams": [], "factors": [], "residuals": []}
    wide = F64 if dtype == F64 else F32
    generator = torch.Generator().manual_seed(0)
    starts = reference.start_values(SETTINGS["damping"])
    for members, shape, sizes, structures in buckets:
        for name in ("params", "grads"):
            values = (torch.randn(shape, generator=generator, dtype=F64) for _ in range(members))
            tensors[name] += [value.to(device, wide) for value in values]
        for size, dense, values in zip(sizes, structures, starts, strict=True):
            eye = torch.eye(size) if dense else torch.ones(size)
            stack = eye.repeat(members, *[1] * eye.dim()).to(device, F64)
            parts = dense and dtype == BF16
            factor = (values[1] * stack).to(wide)
            factor, residual = reference.split(factor) if parts else (factor, None)
            per_axis["grams"].append((values[0] * stack).to(wide))
            per_axis["factors"].append(factor)
            per_axis["residuals"].append(residual)
        rows = [torch.zeros(sizes[0], dtype=wide, device=device) for _ in range(members)]
        tensors["row_square_avgs"] += rows
    tensors["momentum_buffers"] = [torch.zeros_like(p) for p in tensors["params"]]
    return {**tensors, **per_axis, "products": None}


def call(tensors, step=1.0, **changes):
    settings = {**SETTINGS, **changes}
    steps = torch.full((len(tensors["params"]),), float(step))
    ops.rootfree_shampoo_(*tensors.values(), **{"steps": steps, **settings})


def copied(tensors):
    return {
        name: values and [t.clone() if isinstance(t, torch.Tensor) else t for t in values]
        for name, values in tensors.items()
    }


def assert_untouched(tensors, before):
    for name in WRITTEN:
        for actual, expected in zip(tensors[name] or [], before[name] or [], strict=True):
            if isinstance(actual, torch.Tensor) and not actual.is_meta:
                assert_bits_equal([actual], [expected])


def assert_near(tensors, expected, names=WRITTEN[:5]):
    for name in names:
        for actual, truth in zip(tensors[name], expected[name], strict=True):
            torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def operator_call(device, dtype=F32, row_beta=0.9, **kwargs):
    tensors = lists(dtype, device)
    if row_beta is None:
        tensors["row_square_avgs"] = []
    dense = [factor if factor.dim() == 3 else factor.new_empty(0) for factor in tensors["factors"]]
    tensors["products"] = [torch.empty_like(factor) for factor in dense]
    empty = [factor.new_empty(0, dtype=torch.int16) for factor in tensors["factors"]]
    pairs = zip(tensors["residuals"], empty, strict=True)
    tensors["residuals"] = [e if residual is None else residual for residual, e in pairs]
    steps = torch.ones(len(tensors["params"]), device=device)
    settings = {
        "update_factors": True,
        "refresh_products": False,
        "beta1": 0.9,
        "beta2": 0.95,
        **{key: SETTINGS[key] for key in ("damping", "weight_decay", "update_rms")},
        "row_beta": row_beta,
        "maximize": False,
    }
    lr = torch.tensor(0.1, dtype=F64)
    return (*tensors.values(), steps, lr), {**settings, **kwargs}
