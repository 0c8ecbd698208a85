"""The state that factors need: which tensors, of what dtype, and how they start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.matrix import initial_scale, split
from ..reference.rootfree_shampoo import start_values
from .layouts import Layout, batch_axes_of
from .state import Initial


def batched(
    spec: Mapping[str, Initial], shape: Sequence[int], group: Mapping[str, Any]
) -> dict[str, Initial]:
    """The state of all members of a parameter of this shape, from that of one."""
    leading = tuple(shape[: batch_axes_of(shape, group)])
    return {
        key: replace(initial, shape=(*leading, *initial.shape), batch_axes=len(leading))
        for key, initial in spec.items()
    }


def default_dtype(param: Tensor) -> torch.dtype:
    """The factor dtype that suits a parameter's device: bfloat16 where it is native."""
    if param.dtype == torch.float64:
        return torch.float64
    if param.device.type == "cuda":
        native = torch.cuda.get_device_capability(param.device) >= (8, 0)
    else:
        native = param.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def caches_product(layout: Layout, axis: int, interval: int, device: torch.device) -> bool:
    """Whether K K^T of a dense axis is kept between updates, rather than applied as K^T then K.

    With d the side of the factor, or of each block, and e the product of the other axes, keeping it
    costs d^3 / 2 multiply-adds an update (a symmetric product at half price) and d^2 e a step;
    applying both costs 2 d^2 e a step. They break even at d = 2 e in multiply-adds and at d = 1.5 e
    in time on an AMD Zen 5, as K K^T is also written and read. GPU kernels have the first form
    alone.
    """
    size, structure = layout.sizes[axis], layout.structures[axis]
    others = math.prod(layout.sizes) // size
    pays = device.type == "cuda" or 2 * structure.shape(size)[-1] < 3 * interval * others
    return structure.is_dense and pays


def factor_state(layout: Layout, dtype: torch.dtype, start: float) -> dict[str, Initial]:
    """How the factors of a parameter start: c I such that G becomes G / start, momenta of zero.

    Where `start` is 0 they are 0, until a gradient starts them.

    A dense factor has the GEMM dtype; in bfloat16 a 16-bit residual holds the bits that the GEMMs
    do not read. What takes part in no GEMM, as a diagonal factor, is float32, or float64 for
    float64.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec: dict[str, Initial] = {}
    square = torch.tensor(start, dtype=torch.float64, device="cpu")
    scale = initial_scale(square, 0.0, len(layout.sizes)) if start else square
    high, residual = split(scale.float())
    for axis, (size, structure) in enumerate(zip(layout.sizes, layout.structures, strict=True)):
        in_parts = structure.is_dense and dtype == torch.bfloat16
        shape = structure.shape(size)
        kept = dtype if structure.is_dense else wide
        value = (high if in_parts else scale).item()
        spec[f"factor_{axis}"] = Initial(shape, kept, value, structure, size)
        spec[f"factor_momentum_{axis}"] = Initial(shape, kept, 0.0, structure, size)
        if in_parts:
            spec[f"factor_{axis}_residual"] = Initial(
                shape, torch.int16, residual.item(), structure, size
            )
    return spec


def gram_state(layout: Layout, dtype: torch.dtype, damping: float) -> dict[str, Initial]:
    """How S and K of root-free Shampoo start: at `reference.start_values` times the identity.

    K has the dtype of the products, in bfloat16 with a residual, as IF-Shampoo's factors; S has the
    dtype of a sum.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec: dict[str, Initial] = {}
    starts = start_values(damping)
    for axis, (size, structure) in enumerate(zip(layout.sizes, layout.structures, strict=True)):
        shape, (gram, factor) = structure.shape(size), starts[axis]
        spec[f"gram_{axis}"] = Initial(shape, wide, gram, structure, size)
        if structure.is_dense and dtype == torch.bfloat16:
            high, residual = split(torch.tensor(factor, dtype=torch.float32, device="cpu"))
            spec[f"factor_{axis}"] = Initial(shape, dtype, high.item(), structure, size)
            spec[f"factor_{axis}_residual"] = Initial(
                shape, torch.int16, residual.item(), structure, size
            )
        else:
            kept = dtype if structure.is_dense else wide
            spec[f"factor_{axis}"] = Initial(shape, kept, factor, structure, size)
    return spec
