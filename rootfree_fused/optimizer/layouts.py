"""Which factors a parameter's shape owns, and buckets of parameters whose factors are stacked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """How a parameter, or each member, is seen: the sizes of axes, their factors' structures."""

    sizes: tuple[int, ...]
    structures: tuple[Structure, ...]


def layout_of(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """The axes of a parameter, or of each of its members, or None for one without factors.

    Axes of size 1 are dropped; a scalar is a vector of 1. With merge_axes, three axes or more are
    seen as the matrix (first axis, all others), or axes are merged as it names them.

    Raises:
        ValueError: the group's structures, batch_axes or merge_axes do not fit the shape.
    """
    merge = group.get("merge_axes", True)
    merged = [shape[i] for i in range(_batch_axes(shape, group), len(shape))]
    if isinstance(merge, tuple):
        merged = _merged(shape, merged, merge)
    sizes = tuple(d for d in merged if d != 1) or (1,)
    if math.prod(shape) == 0 or (len(sizes) == 1 and group["vector_method"] != "factor"):
        return None
    if merge is True and len(sizes) > 2:
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


def _batch_axes(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    count: int = group.get("batch_axes", 0)
    if count and count >= len(shape):
        allowed = " or ".join(map(str, {0, max(len(shape) - 1, 0)}))
        raise ValueError(
            f"batch_axes={count} leaves a parameter of shape {tuple(shape)} no axis; pass {allowed}"
        )
    return count


def _merged(
    shape: Sequence[int], sizes: Sequence[int], sets: tuple[tuple[int, ...], ...]
) -> list[int]:
    """The sizes of a parameter's axes, or a member's, with those of a set as one."""
    if [axis for axes in sets for axis in axes] != list(range(len(sizes))):
        behind = " behind its batch axes" if len(sizes) < len(shape) else ""
        raise ValueError(
            f"merge_axes is {sets!r} but a parameter of shape {tuple(shape)} has {len(sizes)} axes"
            f"{behind}; name them from 0 on, each once, in order, or put it into another group"
        )
    return [math.prod(sizes[axis] for axis in axes) for axes in sets]


def batched(
    spec: Mapping[str, Initial], shape: Sequence[int], group: Mapping[str, Any]
) -> dict[str, Initial]:
    """The state of all members of a parameter of this shape, from that of one."""
    leading = tuple(shape[: _batch_axes(shape, group)])
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
    """Matrices of one layout that are stepped as one, with their factor state stacked.

    Each list has one tensor an axis: `factors` and `averages`, what they learn from (m of
    IF-Shampoo, S of root-free Shampoo), of shape (matrices, d, d), or (matrices, d) for a diagonal
    factor; `residuals` (`reference.split`) and `products` K K^T of
    shape (matrices, d, d), or empty where there is none. params: positions in the lists of a step
    of the parameters whose members they are.
    """

    params: list[int]
    factors: list[Tensor]
    residuals: list[Tensor]
    averages: list[Tensor]
    products: list[Tensor]
    versions: list[int] | None = None

    def part(self, first: int, last: int, params: list[int]) -> Bucket:
        """Those of `params`, which lie at the positions [first, last)."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[first:last] for tensor in tensors]

        return Bucket(
            params,
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

    def __init__(
        self, states: Sequence[State], average: str, interval: int, batch_axes: int = 0
    ) -> None:
        self._views: list[tuple[State, str, Tensor]] = []
        self._spans: dict[int, tuple[Bucket, int, int]] = {}  # a state's positions, [first, last)
        alike: dict[Any, list[tuple[State, State]]] = defaultdict(list)
        for state in states:
            own = {key: value for key, value in state.items() if _is_factor(key)}
            kind = tuple((k, v.shape[batch_axes:], v.dtype, v.device) for k, v in own.items())
            if kind:
                stack = {key: own[key].view(-1, *shape) for key, shape, *_ in kind}
                alike[kind].append((state, stack))
        for found in alike.values():
            for run in runs(found, _follow):
                bucket = _stacked([stack for _, stack in run], average, interval)
                last = 0
                for state, stack in run:
                    first, last = last, last + len(stack["factor_0"])
                    self._spans[id(state)] = bucket, first, last
                    self._views += [(state, key, state[key]) for key in stack]

    def hold(self, states: Sequence[State]) -> bool:
        """Whether they are still the stacks of these states' tensors."""
        return all(id(state) in self._spans for state in states if "factor_0" in state) and all(
            state.get(key) is view for state, key, view in self._views
        )

    def plan(self, states: Sequence[State], updates_factors: Sequence[bool]) -> BucketPlan:
        """Buckets of these states: neighbours in a stack that update their factors together.

        An empty state is a part of another's.
        """
        vectors = [i for i, state in enumerate(states) if state and "factor_0" not in state]
        found: dict[tuple[int, bool], list[tuple[int, int, int]]] = defaultdict(list)
        stacks: dict[int, Bucket] = {}
        for i, state in enumerate(states):
            if "factor_0" in state:
                stack, first, last = self._spans[id(state)]
                stacks[id(stack)] = stack
                found[id(stack), updates_factors[i]].append((first, last, i))
        buckets = []
        for (stack_id, _), spans in found.items():
            for run in runs(sorted(spans), lambda a, b: b[0] == a[1]):
                params = [i for *_, i in run]
                buckets.append(stacks[stack_id].part(run[0][0], run[-1][1], params))
        return BucketPlan(vectors, buckets)


def _is_factor(key: str) -> bool:
    return key.startswith(STACKED)


def _follow(last: tuple[State, State], following: tuple[State, State]) -> bool:
    return all(follows(last[1][key], tensor) for key, tensor in following[1].items())


def _stacked(states: Sequence[State], average: str, interval: int) -> Bucket:
    """The whole stack of some states, each a stack of its own."""
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
