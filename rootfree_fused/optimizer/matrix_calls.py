"""What a step of IFShampoo asks of the operators: their calls on known tensors, by kind of step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import matrix_kernel
from ..ops.methods import RMSPROP, settings_of
from ..ops.schemas import as_scalar_tensor
from ..reference.matrix import largest_update
from .amp_and_graphs import Scaling
from .base import Work
from .diagonal import state_lists, update_
from .groups import Group
from .layouts import Bucket, BucketPlan, Stacks
from .schedule import UpdatesFactors
from .state import momentum_buffers

# What the operator takes of a group as it is.
_SETTINGS = (
    *("factor_lr", "factor_momentum", "damping", "momentum", "weight_decay"),
    *("decoupled", "maximize"),
)
# An operator's call on known tensors, for their gradients, a group's settings and a scaler's.
Call = Callable[[list[Tensor], Group, Scaling], None]


class KnownCalls:
    """The calls on the tensors of a step by its kind, each with its plan on the same stacks."""

    def __init__(self) -> None:
        self.stacks: Stacks | None = None
        self.by_kind: dict[UpdatesFactors, tuple[BucketPlan, list[Call]]] = {}


def planned_calls(
    group: Group, updates_factors: UpdatesFactors, work: Work, plan: BucketPlan
) -> list[Call]:
    """What a plan asks of the operators."""
    calls: list[Call] = []
    if plan.vectors:
        params, states = _pick(plan.vectors, work.params, work.states)
        calls.append(_Vectors(plan.vectors, params, state_lists(RMSPROP, states, group)))
    # One call for all buckets of a device that update their factors, and one for the others; on the
    # CPU they run one by one.
    together: dict[tuple[bool, Hashable], list[Bucket]] = defaultdict(list)
    for bucket in plan.buckets:
        device = bucket.factors[0].device.type
        key = id(bucket) if device == "cpu" else device
        together[updates_factors[bucket.members[0]], key].append(bucket)
    for (update, _), buckets in together.items():
        members = [i for bucket in buckets for i in bucket.members]
        params, grads, states = _pick(members, work.params, work.grads, work.states)
        buffers = momentum_buffers(states, group["momentum"])
        calls.append(_Matrices(members, buckets, update, params, buffers, grads))
    return calls


def _pick(indices: list[int], *lists: list[Any]) -> list[list[Any]]:
    return [[items[i] for i in indices] for items in lists]


class _Vectors:
    """The call of the operator for the parameters at these indices, which have no factors."""

    def __init__(
        self, indices: list[int], params: list[Tensor], states: list[list[Tensor]]
    ) -> None:
        self._indices, self._params, self._states = indices, params, states

    def __call__(self, grads: list[Tensor], group: Group, scaling: Scaling) -> None:
        own = [grads[i] for i in self._indices]
        update_(RMSPROP, group, scaling, self._params, own, *self._states)


class _Matrices:
    """The call of the operator for the parameters at these indices, those of some buckets."""

    def __init__(
        self,
        indices: list[int],
        buckets: list[Bucket],
        update_factors: bool,
        params: list[Tensor],
        buffers: list[Tensor],
        grads: list[Tensor],
    ) -> None:
        self._indices, self._buckets, self._update_factors = indices, buckets, update_factors
        self._params, self._buffers = params, buffers
        self._stacks = [
            [tensor for bucket in buckets for tensor in getattr(bucket, name)]
            for name in ("factors", "residuals", "momenta", "products")
        ]
        self._axes = [len(bucket.factors) for bucket in buckets]
        alone = len(buckets) == 1 and all(t.is_contiguous() for t in (*params, *grads, *buffers))
        self._kernel = matrix_kernel(params, buckets[0].residuals) if alone else None

    def __call__(self, grads: list[Tensor], group: Group, scaling: Scaling) -> None:
        refresh_products = any(bucket.products_are_stale() for bucket in self._buckets)
        tensors = (
            self._params,
            [grads[i] for i in self._indices],
            *self._stacks,
            self._buffers,
            as_scalar_tensor(group["lr"]),
        )
        scalars = {
            **settings_of(group, _SETTINGS),
            "update_factors": self._update_factors,
            "refresh_products": refresh_products,
            "batch_size": float(group["batch_size"]),
            "bound": largest_update(group["max_update"], group["batch_size"], group["damping"]),
        }
        if self._kernel and not scaling:
            self._kernel(*tensors, **scalars)
        else:
            torch.ops.rootfree_fused.ifshampoo_(*tensors, axes=self._axes, **scalars, **scaling)
        # Now, since the specification counts as a write. A step that the device may skip makes no
        # new K K^T there; without an interval each does.
        if "found_inf" not in scaling or group["update_interval"] > 1:
            for bucket in self._buckets:
                bucket.note_versions()
