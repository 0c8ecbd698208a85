"""What a step asks of the operators on matrices: their calls on known tensors, by kind of step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import matrix, rootfree_shampoo
from ..ops.dispatch import matrix_kernel
from ..ops.methods import RMSPROP, VECTOR_ADAM, VECTOR_ROOTFREE, DiagonalMethod, settings_of
from ..ops.schemas import as_scalar_tensor
from ..reference.matrix import largest_update
from .amp_and_graphs import Scaling
from .base import Work
from .diagonal import state_lists, update_
from .groups import Group
from .layouts import Bucket, BucketPlan, Stacks
from .schedule import UpdatesFactors
from .state import ROWS, momentum_buffers

# An operator's call on known tensors, for their gradients, a group's settings and a scaler's.
Call = Callable[[list[Tensor], Group, Scaling], None]


class KnownCalls:
    """The calls on the tensors of a step by its kind, each with its plan on the same stacks."""

    def __init__(self) -> None:
        self.stacks: Stacks | None = None
        self.by_kind: dict[UpdatesFactors, tuple[BucketPlan, list[Call]]] = {}


@dataclass(frozen=True)
class MatrixMethod:
    """A method with factors, the operator `torch.ops.rootfree_fused.<name>`.

    kernel: the operator in C++ that serves one bucket of bfloat16 factors on the CPU.
    average: the keys of what the factors are learned from, an axis.
    undamped: what goes wrong at a damping of 0.
    vectors: what updates parameters without factors, by the setting vector_method.
    tensors, settings: what the operator takes, but for lr and which products are stale.
    """

    name: str
    kernel: str
    average: str
    undamped: str
    vectors: Mapping[str, DiagonalMethod]
    tensors: Callable[[_Matrices, list[Tensor], Group], tuple[Any, ...]]
    settings: Callable[[Group], dict[str, Any]]


def planned_calls(
    method: MatrixMethod,
    group: Group,
    updates_factors: UpdatesFactors,
    work: Work,
    plan: BucketPlan,
) -> list[Call]:
    """What a plan asks of the operators."""
    calls: list[Call] = []
    if plan.vectors:
        calls.append(_Vectors(method.vectors[group["vector_method"]], plan.vectors, work, group))
    # One call for all buckets of a device that update their factors, and one for the others; on the
    # CPU they run one by one.
    together: dict[tuple[bool, Hashable], list[Bucket]] = defaultdict(list)
    for bucket in plan.buckets:
        device = bucket.factors[0].device.type
        key = id(bucket) if device == "cpu" else device
        together[updates_factors[bucket.members[0]], key].append(bucket)
    for (update, _), buckets in together.items():
        calls.append(_Matrices(method, buckets, update, work, group))
    return calls


def _pick(indices: list[int], *lists: list[Any]) -> list[list[Any]]:
    return [[items[i] for i in indices] for items in lists]


def _steps_of(indices: list[int], steps: Tensor) -> Callable[[], Tensor]:
    """How to read the counts of the parameters at these indices, which change in place."""
    if indices == list(range(len(steps))):
        return lambda: steps
    chosen = torch.tensor(indices, device=steps.device)
    return lambda: steps.index_select(0, chosen)


class _Vectors:
    """The call of the operator for the parameters at these indices, which have no factors."""

    def __init__(
        self, method: DiagonalMethod, indices: list[int], work: Work, group: Group
    ) -> None:
        self._method, self._indices = method, indices
        self._params, states = _pick(indices, work.params, work.states)
        self._states = state_lists(method, states, group)
        self._steps = _steps_of(indices, work.steps) if method.counts else None

    def __call__(self, grads: list[Tensor], group: Group, scaling: Scaling) -> None:
        own = [grads[i] for i in self._indices]
        steps = (self._steps(),) if self._steps else ()
        update_(self._method, group, scaling, self._params, own, *self._states, *steps)


class _Matrices:
    """The call of the operator for the members of some buckets."""

    def __init__(
        self,
        method: MatrixMethod,
        buckets: list[Bucket],
        update_factors: bool,
        work: Work,
        group: Group,
    ) -> None:
        self._method, self._buckets, self._update_factors = method, buckets, update_factors
        self._indices = [i for bucket in buckets for i in bucket.members]
        self.params, self.states = _pick(self._indices, work.params, work.states)
        self.buffers = momentum_buffers(self.states, group.get("momentum", 1.0))
        self.stacks = {
            name: [tensor for bucket in buckets for tensor in getattr(bucket, name)]
            for name in ("factors", "residuals", "averages", "products")
        }
        self.steps = _steps_of(self._indices, work.steps)
        own = [work.grads[i] for i in self._indices]
        self._axes = (
            {} if method is ROOTFREE_SHAMPOO else {"axes": [len(b.factors) for b in buckets]}
        )
        alone = len(buckets) == 1 and all(
            t.is_contiguous() for t in (*self.params, *own, *self.buffers)
        )
        self._kernel = (
            matrix_kernel(method.kernel, self.params, buckets[0].residuals) if alone else None
        )

    def __call__(self, grads: list[Tensor], group: Group, scaling: Scaling) -> None:
        refresh_products = any(bucket.products_are_stale() for bucket in self._buckets)
        own = [grads[i] for i in self._indices]
        tensors = (*self._method.tensors(self, own, group), as_scalar_tensor(group["lr"]))
        scalars = {
            **self._method.settings(group),
            "update_factors": self._update_factors,
            "refresh_products": refresh_products,
        }
        if self._kernel and not scaling:
            self._kernel(*tensors, **scalars)
        else:
            operator = getattr(torch.ops.rootfree_fused, self._method.name)
            operator(*tensors, **self._axes, **scalars, **scaling)
        # Now, since the specification counts as a write. A step that the device may skip makes no
        # new K K^T there; without an interval each does.
        if "found_inf" not in scaling or group["update_interval"] > 1:
            for bucket in self._buckets:
                bucket.note_versions()


def _ifshampoo_tensors(call: _Matrices, grads: list[Tensor], group: Group) -> tuple[Any, ...]:
    names = ("factors", "residuals", "averages", "products")
    return (call.params, grads, *(call.stacks[name] for name in names), call.buffers)


def _ifshampoo_settings(group: Group) -> dict[str, Any]:
    names = ("factor_lr", "factor_momentum", "damping", "momentum", "weight_decay")
    return {
        **settings_of(group, (*names, "decoupled", "maximize")),
        "batch_size": float(group["batch_size"]),
        "bound": largest_update(group["max_update"], group["batch_size"], group["damping"]),
    }


def _rootfree_shampoo_tensors(
    call: _Matrices, grads: list[Tensor], group: Group
) -> tuple[Any, ...]:
    names = ("averages", "factors", "residuals", "products")
    stacks = (call.stacks[name] for name in names)
    rows = [] if group["row_beta"] is None else [state[ROWS] for state in call.states]
    return (call.params, grads, call.buffers, rows, *stacks, call.steps())


def _rootfree_shampoo_settings(group: Group) -> dict[str, Any]:
    names = ("beta1", "beta2", "damping", "weight_decay", "update_rms", "row_beta", "maximize")
    return settings_of(group, names)


IFSHAMPOO = MatrixMethod(
    name="ifshampoo_",
    kernel="_ifshampoo_bf16_",
    average="factor_momentum_{}",
    undamped=matrix.UNDAMPED,
    vectors={"rmsprop": RMSPROP, "factor": RMSPROP},
    tensors=_ifshampoo_tensors,
    settings=_ifshampoo_settings,
)
ROOTFREE_SHAMPOO = MatrixMethod(
    name="rootfree_shampoo_",
    kernel="_rootfree_shampoo_bf16_",
    average="gram_{}",
    undamped=rootfree_shampoo.UNDAMPED,
    vectors={"adam": VECTOR_ADAM, "rootfree": VECTOR_ROOTFREE},
    tensors=_rootfree_shampoo_tensors,
    settings=_rootfree_shampoo_settings,
)
