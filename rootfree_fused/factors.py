"""Which factors a parameter's shape owns, and buckets of parameters whose factors are stacked."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._state import Initial, State, stack


@dataclass(frozen=True)
class Layout:
    """How IF-Shampoo sees a parameter: the sizes of its axes and which have a dense factor."""

    sizes: tuple[int, ...]
    dense: tuple[bool, ...]


def layout_of(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """The axes of a parameter, or None for one that root-free RMSProp updates.

    Axes of size 1 are dropped; a scalar is a vector of 1. With merge_axes, three axes or more are
    seen as the matrix (first axis, all others).

    Raises:
        ValueError: the group's structures do not fit the shape.
    """
    sizes = tuple(d for d in shape if d != 1) or (1,)
    if math.prod(sizes) == 0 or (len(sizes) == 1 and group["vector_method"] == "rmsprop"):
        return None
    if group["merge_axes"] and len(sizes) > 2:
        sizes = (sizes[0], math.prod(sizes[1:]))
    structures = group["structures"]
    if isinstance(structures, str):
        structures = (structures,) * len(sizes)
    elif len(structures) != len(sizes):
        raise ValueError(
            f"structures is {structures!r}, of length {len(structures)}, but a parameter of shape "
            f"{tuple(shape)} has the axes {sizes}; pass one structure an axis, or one for all"
        )
    limit = group["max_dense_dim"]
    for size, structure in zip(sizes, structures, strict=True):
        if structure == "dense" and size > limit:
            raise ValueError(
                f"structures is {group['structures']!r} but a parameter of shape {tuple(shape)} "
                f"has an axis of {size}, above max_dense_dim={limit}: its factor would take "
                f"{6 * size * size / 2**30:.1f} GiB; pass 'auto' or 'diagonal', or a larger "
                "max_dense_dim"
            )
    dense = tuple(
        structure == "dense" or (structure == "auto" and size <= limit)
        for size, structure in zip(sizes, structures, strict=True)
    )
    return Layout(sizes, dense)


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

    With d the axis and e the product of the others, keeping it costs d^3 / 2 multiply-adds an
    update (a symmetric product at half price) and d^2 e a step; applying both costs 2 d^2 e a step.
    They break even at d = 2 e in multiply-adds and at d = 1.5 e in time on an AMD Zen 5, as K K^T
    is also written and read. GPU kernels have the first form alone.
    """
    size = layout.sizes[axis]
    others = math.prod(layout.sizes) // size
    return layout.dense[axis] and (device.type == "cuda" or 2 * size < 3 * interval * others)


def factor_state(layout: Layout, dtype: torch.dtype) -> dict[str, Initial]:
    """How the factors of a parameter start: the identity, with momenta of zero.

    A dense factor has the GEMM dtype; in bfloat16 a 16-bit residual holds the bits that the GEMMs
    do not read. A diagonal factor takes part in no GEMM and is float32, or float64 for float64.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec: dict[str, Initial] = {}
    for axis, (size, dense) in enumerate(zip(layout.sizes, layout.dense, strict=True)):
        shape = (size, size) if dense else (size,)
        kept = dtype if dense else wide
        spec[f"factor_{axis}"] = functools.partial(_identity, shape, kept)
        spec[f"factor_momentum_{axis}"] = functools.partial(_zeros, shape, kept)
        if dense and dtype == torch.bfloat16:
            spec[f"factor_{axis}_residual"] = functools.partial(_zeros, shape, torch.int16)
    return spec


def _identity(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.eye(shape[0], dtype=dtype, device=device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass
class Bucket:
    """Parameters of one layout, with their factor state stacked along a first axis.

    Each list has one tensor an axis: `factors` and `momenta` of shape (members, d, d), or
    (members, d) for a diagonal factor; `residuals` (`reference.split`) and `products` K K^T of
    shape (members, d, d), or empty where there is none.
    """

    layout: Layout
    members: list[int]
    keys: list[str]
    views: list[Tensor]
    factors: list[Tensor]
    residuals: list[Tensor]
    momenta: list[Tensor]
    products: list[Tensor]
    versions: list[int] | None = None

    def is_intact(self, states: Sequence[State]) -> bool:
        """Whether the members' state tensors still are the views that were stacked."""
        found = [states[i].get(key) for key in self.keys for i in self.members]
        return all(map(operator.is_, found, self.views))

    def is_due_as_one(self, due: Sequence[bool]) -> bool:
        return len({due[i] for i in self.members}) == 1

    def products_are_stale(self) -> bool:
        """Whether the factors were written by anything but the operator since `note_versions`.

        The operator does not count as a write (it keeps the products itself); a load does.
        """
        return [factor._version for factor in self.factors] != self.versions

    def note_versions(self) -> None:
        self.versions = [factor._version for factor in self.factors]


@dataclass
class Plan:
    """Which parameters root-free RMSProp updates (`vectors`), and the others by bucket."""

    vectors: list[int]
    buckets: list[Bucket]

    def fits(self, states: Sequence[State], due: Sequence[bool]) -> bool:
        """Whether this is the plan of these states, with every bucket due as one or not at all."""
        planned = len(self.vectors) + sum(len(bucket.members) for bucket in self.buckets)
        return (
            planned == len(states)
            and all("square_avg" in states[i] for i in self.vectors)
            and (len(set(due)) == 1 or all(bucket.is_due_as_one(due) for bucket in self.buckets))
            and all(bucket.is_intact(states) for bucket in self.buckets)
        )


def build_plan(
    layouts: Sequence[Layout | None],
    due: Sequence[bool],
    states: Sequence[State],
    interval: int,
) -> Plan:
    """Stack the factor state of parameters of one layout and device that are due together."""
    members: dict[tuple[Layout, torch.device, bool], list[int]] = defaultdict(list)
    vectors = []
    for i, layout in enumerate(layouts):
        if layout is None:
            vectors.append(i)
        else:
            members[layout, states[i]["factor_0"].device, due[i]].append(i)
    buckets = [
        _build_bucket(layout, places, [states[i] for i in places], interval)
        for (layout, _, _), places in members.items()
    ]
    return Plan(vectors, buckets)


def _build_bucket(layout: Layout, places: list[int], states: list[State], interval: int) -> Bucket:
    axes = range(len(layout.sizes))
    factors = [stack(states, f"factor_{n}") for n in axes]
    empty = [factor.new_empty(0) for factor in factors]
    split = [f"factor_{n}_residual" in states[0] for n in axes]
    keys = [
        *(f"factor_{n}" for n in axes),
        *(f"factor_momentum_{n}" for n in axes),
        *(f"factor_{n}_residual" for n in axes if split[n]),
    ]
    residuals = [stack(states, f"factor_{n}_residual") if split[n] else empty[n] for n in axes]
    momenta = [stack(states, f"factor_momentum_{n}") for n in axes]
    device = factors[0].device
    products = [
        torch.empty_like(factors[n]) if caches_product(layout, n, interval, device) else empty[n]
        for n in axes
    ]
    views = [state[key] for key in keys for state in states]
    return Bucket(layout, places, keys, views, factors, residuals, momenta, products)
