"""Which factors a parameter's shape owns, and buckets of parameters whose factors are stacked."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.matrix import initial_scale, split
from ..reference.rootfree_shampoo import start_values
from ..reference.structures import (
    DENSE,
    DIAGONAL,
    STRUCTURES,
    Structure,
    structure_of_stack,
)
from .stacks import as_stack, follows, runs
from .state import STACKED, Initial, State


@dataclass(frozen=True)
class Layout:
    """How a parameter is seen: the sizes of its axes and their factors' structures."""

    sizes: tuple[int, ...]
    structures: tuple[Structure, ...]


def layout_of(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """The axes of a parameter, or None for one without factors.

    Axes of size 1 are dropped; a scalar is a vector of 1. With merge_axes, three axes or more are
    seen as the matrix (first axis, all others).

    Raises:
        ValueError: the group's structures do not fit the shape.
    """
    sizes = tuple(d for d in shape if d != 1) or (1,)
    if math.prod(sizes) == 0 or (len(sizes) == 1 and group["vector_method"] != "factor"):
        return None
    if group.get("merge_axes", True) and len(sizes) > 2:
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
    automatic = (DENSE if size <= limit else DIAGONAL for size in sizes)
    return Layout(
        sizes,
        tuple(
            structure if name == "auto" else STRUCTURES[name]
            for name, structure in zip(structures, automatic, strict=True)
        ),
    )


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
    pays = device.type == "cuda" or 2 * size < 3 * interval * others
    return layout.structures[axis].is_dense and pays


def factor_state(layout: Layout, dtype: torch.dtype, start: float) -> dict[str, Initial]:
    """How the factors of a parameter start: c I such that G becomes G / start, momenta of zero.

    Where `start` is 0 they are 0, until a gradient starts them.

    A dense factor has the GEMM dtype; in bfloat16 a 16-bit residual holds the bits that the GEMMs
    do not read. A diagonal factor takes part in no GEMM and is float32, or float64 for float64.
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
        spec[f"factor_{axis}"] = Initial(shape, kept, value, structure)
        spec[f"factor_momentum_{axis}"] = Initial(shape, kept)
        if in_parts:
            spec[f"factor_{axis}_residual"] = Initial(
                shape, torch.int16, residual.item(), structure
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
        spec[f"gram_{axis}"] = Initial(shape, wide, gram, structure)
        if structure.is_dense and dtype == torch.bfloat16:
            high, residual = split(torch.tensor(factor, dtype=torch.float32, device="cpu"))
            spec[f"factor_{axis}"] = Initial(shape, dtype, high.item(), structure)
            spec[f"factor_{axis}_residual"] = Initial(
                shape, torch.int16, residual.item(), structure
            )
        else:
            kept = dtype if structure.is_dense else wide
            spec[f"factor_{axis}"] = Initial(shape, kept, factor, structure)
    return spec


@dataclass
class Bucket:
    """Parameters of one layout that are stepped as one, with their factor state stacked.

    Each list has one tensor an axis: `factors` and `averages`, what they learn from (m of
    IF-Shampoo, S of root-free Shampoo), of shape (members, d, d), or (members, d) for a diagonal
    factor; `residuals` (`reference.split`) and `products` K K^T of
    shape (members, d, d), or empty where there is none. members: positions in the lists of a step.
    """

    members: list[int]
    factors: list[Tensor]
    residuals: list[Tensor]
    averages: list[Tensor]
    products: list[Tensor]
    versions: list[int] | None = None

    def part(self, first: int, members: list[int]) -> Bucket:
        """The `members` that lie from position `first` on."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[first : first + len(members)] for tensor in tensors]

        return Bucket(
            members,
            cut(self.factors),
            cut(self.residuals),
            cut(self.averages),
            cut(self.products),
        )

    def products_are_stale(self) -> bool:
        """Whether the factors were written by anything but the operator since `note_versions`.

        The operator does not count as a write (it keeps the products itself); a load does.
        """
        return [factor._version for factor in self.factors] != self.versions

    def note_versions(self) -> None:
        self.versions = [factor._version for factor in self.factors]


@dataclass
class BucketPlan:
    """Which parameters have no factors (`vectors`), and the others by bucket."""

    vectors: list[int]
    buckets: list[Bucket]


class Stacks:
    """The factor state of a group's parameters, as stacks that its buckets are parts of.

    All steps of the group share them, whichever gradients there are, and with them K K^T, which a
    step of one bucket must not leave behind in another.
    """

    def __init__(self, states: Sequence[State], average: str, interval: int) -> None:
        self._views: list[tuple[State, str, Tensor]] = []
        self._positions: dict[int, tuple[Bucket, int]] = {}
        alike: dict[Any, list[State]] = defaultdict(list)
        for state in states:
            kind = [(k, v.shape, v.dtype, v.device) for k, v in state.items() if _is_factor(k)]
            if kind:
                alike[tuple(kind)].append(state)
        for kind, members in alike.items():
            keys = [key for key, *_ in kind]
            for run in runs(members, functools.partial(_follow, keys)):
                bucket = _stacked(run, average, interval)
                for position, state in enumerate(run):
                    self._positions[id(state)] = bucket, position
                    self._views += [(state, key, state[key]) for key in keys]

    def hold(self, states: Sequence[State]) -> bool:
        """Whether they are still the stacks of these states' tensors."""
        return all(id(state) in self._positions for state in states if "factor_0" in state) and all(
            state.get(key) is view for state, key, view in self._views
        )

    def plan(self, states: Sequence[State], updates_factors: Sequence[bool]) -> BucketPlan:
        """Buckets of these states: neighbours in a stack that update their factors together."""
        vectors = [i for i, state in enumerate(states) if "factor_0" not in state]
        found: dict[tuple[int, bool], list[tuple[int, int]]] = defaultdict(list)
        stacks: dict[int, Bucket] = {}
        for i, state in enumerate(states):
            if "factor_0" in state:
                stack, position = self._positions[id(state)]
                stacks[id(stack)] = stack
                found[id(stack), updates_factors[i]].append((position, i))
        buckets = []
        for (stack_id, _), members in found.items():
            for run in runs(sorted(members), lambda a, b: b[0] == a[0] + 1):
                buckets.append(stacks[stack_id].part(run[0][0], [i for _, i in run]))
        return BucketPlan(vectors, buckets)


def _is_factor(key: str) -> bool:
    return key.startswith(STACKED)


def _follow(keys: Sequence[str], last: State, state: State) -> bool:
    return all(follows(last[key], state[key]) for key in keys)


def _stacked(states: Sequence[State], average: str, interval: int) -> Bucket:
    axes = range(sum(average.format(axis) in states[0] for axis in range(len(states[0]))))

    def stacks(key: str) -> list[Tensor]:
        names = [key.format(axis) for axis in axes]
        return [
            as_stack([state[name] for state in states]) if name in states[0] else empty[axis]
            for axis, name in enumerate(names)
        ]

    empty = [states[0][f"factor_{axis}"].new_empty(0) for axis in axes]
    factors = stacks("factor_{}")
    layout = Layout(
        tuple(factor.shape[1] for factor in factors), tuple(map(structure_of_stack, factors))
    )
    products = [
        torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        if caches_product(layout, axis, interval, factor.device)
        else empty[axis]
        for axis, factor in enumerate(factors)
    ]
    residuals, averages = stacks("factor_{}_residual"), stacks(average)
    return Bucket(list(range(len(states))), factors, residuals, averages, products)
