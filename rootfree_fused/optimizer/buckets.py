"""Buckets of parameters whose factors are stacked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .factor_state import caches_product
from .layouts import Layout
from .stacks import as_stack, follows, runs
from .state import STACKED, State


@dataclass
class Bucket:
    """Matrices of one layout that are stepped as one, with their factor state stacked.

    Each list has one tensor an axis: `factors` and `averages`, what they learn from (m of
    IF-Shampoo, S of root-free Shampoo), of shape (matrices, *structure.shape(d)); `residuals`
    (`reference.split`) and `products` K K^T of the same shape, or empty where there is none.
    params: positions in the lists of a step of the parameters whose members they are.
    """

    layout: Layout
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
            self.layout,
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

    layouts: of each state, None where it has no factors.
    """

    def __init__(
        self,
        states: Sequence[State],
        layouts: Sequence[Layout | None],
        average: str,
        interval: int,
        batch_axes: int = 0,
    ) -> None:
        self._views: list[tuple[State, str, Tensor]] = []
        self._spans: dict[int, tuple[Bucket, int, int]] = {}  # a state's positions, [first, last)
        alike: dict[Any, list[tuple[State, State]]] = defaultdict(list)
        for state, layout in zip(states, layouts, strict=True):
            own = {key: value for key, value in state.items() if _is_factor(key)}
            kind = tuple((k, v.shape[batch_axes:], v.dtype, v.device) for k, v in own.items())
            if kind and layout is not None:
                count = math.prod(own["factor_0"].shape[:batch_axes])  # of what may be empty
                stack = {key: own[key].view(count, *shape) for key, shape, *_ in kind}
                alike[layout, kind].append((state, stack))
        for (layout, _), found in alike.items():
            for run in runs(found, _follow):
                bucket = _stacked(layout, [stack for _, stack in run], average, interval)
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


def _stacked(layout: Layout, states: Sequence[State], average: str, interval: int) -> Bucket:
    """The whole stack of some states, each a stack of its own."""
    axes = range(len(layout.sizes))

    def stacks(key: str) -> list[Tensor]:
        names = [key.format(axis) for axis in axes]
        return [
            as_stack([state[name] for state in states]) if name in states[0] else empty[axis]
            for axis, name in enumerate(names)
        ]

    empty = [states[0][f"factor_{axis}"].new_empty(0) for axis in axes]
    factors = stacks("factor_{}")
    products = [
        torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        if caches_product(layout, axis, interval, factor.device)
        else empty[axis]
        for axis, factor in enumerate(factors)
    ]
    residuals, averages = stacks("factor_{}_residual"), stacks(average)
    return Bucket(layout, list(range(len(states))), factors, residuals, averages, products)
