"""What a step asks of the operators on matrices: their calls on known tensors, by kind of step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import by_reference, matrix, rootfree_shampoo, structure_names
from ..ops.checks import gradients_suit
from ..ops.dispatch import matrix_kernel, matrix_kernels
from ..ops.methods import RMSPROP, VECTOR_ADAM, VECTOR_ROOTFREE, DiagonalMethod, settings_of
from ..ops.schemas import as_scalar_tensor
from ..reference.matrix import largest_update
from ..reference.structures import Blocks
from . import formats
from .amp_and_graphs import Scaling
from .base import Work
from .buckets import Bucket, BucketPlan, Stacks
from .diagonal import (
    KnownUpdate,
    UpdateAtGradients,
    lowbit_calls,
    number_or_tensor,
    state_lists,
)
from .groups import Group
from .joint import Joints
from .known_tensors import Call, PlanAtGradients, reader
from .schedule import UpdatesFactors
from .stacks import members_of, steps_of
from .state import ROWS, State, momentum_buffers
from .staying import RowsOfRanks
from .unpacked import Unpacked


class KnownCalls:
    """The calls on the tensors of a step by its kind, each with its plan on the same stacks."""

    def __init__(self) -> None:
        self.stacks: Stacks | None = None
        self.joints: Joints | None = None
        self.by_kind: dict[Hashable, tuple[BucketPlan, list[Call]]] = {}


@dataclass(frozen=True)
class MatrixMethod:
    """A method with factors, the operator `torch.ops.rootfree_fused.<name>`.

    kernel: the operator in C++ that serves one bucket of bfloat16 factors on the CPU.
    average: the keys of what the factors are learned from, an axis.
    structures: the names of those that its factors may have.
    undamped: what goes wrong at a damping of 0.
    vectors: what updates parameters without factors, by the setting vector_method.
    flops_of_blocks: of an update of a factor b x b beside the products with the gradient, in b^3.
    tensors, axes, settings: what the operator takes, but for steps, if it `counts`, for lr and for
        which products are stale.
    """

    name: str
    kernel: str
    average: str
    structures: frozenset[str]
    undamped: str
    vectors: Mapping[str, DiagonalMethod]
    tensors: Callable[[_Matrices, list[Tensor]], tuple[Any, ...]]
    axes: Callable[[list[Bucket]], dict[str, Any]]
    settings: Callable[[Group], dict[str, Any]]
    counts: bool
    flops_of_blocks: int


def planned_calls(
    method: MatrixMethod,
    index: int,
    group: Group,
    updates_factors: UpdatesFactors,
    work: Work,
    plan: BucketPlan,
    addresses: Tensor | None,
    joints: Joints | None,
    rows: RowsOfRanks | None = None,
) -> list[Call]:
    """What a plan asks of the operators.

    index: of the group. addresses: of the gradients, as a `Call` takes them. rows: of its only
    matrix, where other ranks have the others; the specification steps it.
    """
    calls: list[Call] = []
    if joints:
        work = work._replace(params=joints.params, states=joints.states)
        calls.append(lambda *_: joints.read_())
    in_formats = formats.are_used(group)
    if in_formats and work.places is None:
        work = work._replace(places=formats.places_of(index, group, work.params))
    if plan.vectors:
        vectors = method.vectors[group["vector_method"]]
        if in_formats:
            calls += lowbit_calls(vectors, index, group, work, addresses, plan.vectors)
        else:
            calls.append(_vectors(vectors, plan.vectors, work, group, addresses))
    # One call for all buckets of a device that update their factors, and one for the others; on the
    # CPU they run one by one.
    together: dict[tuple[bool, Hashable], list[Bucket]] = defaultdict(list)
    for bucket in plan.buckets:
        device = bucket.factors[0].device.type
        key = device if device != "cpu" and bucket.layout.in_kernels else id(bucket)
        together[updates_factors[bucket.params[0]], key].append(bucket)
    for (update, _), buckets in together.items():
        if not in_formats:
            calls.append(_Matrices(method, buckets, update, work, group, addresses, joints, rows))
            continue
        unpacked = Unpacked(group, [i for bucket in buckets for i in bucket.params], work)
        wide = work._replace(params=unpacked.params, states=unpacked.states)
        calls.append(partial(_without_addresses, unpacked.read_))
        calls.append(_Matrices(method, buckets, update, wide, group, addresses, unpacked, rows))
        calls.append(partial(_without_addresses, unpacked.write_))
    if joints:
        calls.append(lambda *_: joints.write_())
    return calls


def _without_addresses(
    run: Callable[[Group, Scaling], None], _: Tensor | None, group: Group, scaling: Scaling
) -> None:
    """As a `Call` of what asks for the gradients itself."""
    run(group, scaling)


class _Members:
    """The members of the parameters at these indices; owners: of which parameter each is."""

    def __init__(
        self,
        indices: list[int],
        work: Work,
        batch_axes: int,
        joints: Joints | Unpacked | None = None,
    ) -> None:
        self._batch_axes = batch_axes
        owned = [work.params[i] for i in indices]
        self._read = partial(joints.grads, indices) if joints else reader(owned)
        self.params = self.of(owned)
        self.states = [work.states[i] for i in indices]  # of the parameters
        counts = [math.prod(param.shape[:batch_axes]) for param in owned]
        self.owners = [i for i, n in zip(indices, counts, strict=True) for _ in range(n)]

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of one tensor a parameter."""
        return members_of(tensors, self._batch_axes)

    def grads(self) -> list[Tensor]:
        return self.of(self._read())

    def own_states(self, keys: Iterable[str]) -> list[State]:
        """Of these keys, which all parameters have, the state of each member."""
        columns = [self.of([state[key] for state in self.states]) for key in keys]
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _vectors(
    method: DiagonalMethod,
    indices: list[int],
    work: Work,
    group: Group,
    addresses: Tensor | None,
) -> Call:
    """The call of the operator for the parameters at these indices, which have no factors.

    Members matter to a method that sees a tensor as a whole; to others an element is an element.
    """
    own = _Members(indices, work, group.get("batch_axes", 0) if method.by_tensor else 0)
    states = own.own_states(method.states) if method.by_tensor else own.states
    steps = steps_of(own.owners, work.steps)
    lists = [own.params, *state_lists(method, states, group)]
    parts = work.parts and work.parts.at(indices)
    known = KnownUpdate(method, lists, steps, own.grads, gradients_suit(own.params), parts)
    return UpdateAtGradients(known, own.owners, addresses)


class _Matrices:
    """The call of the operator for the members of some buckets."""

    def __init__(
        self,
        method: MatrixMethod,
        buckets: list[Bucket],
        update_factors: bool,
        work: Work,
        group: Group,
        addresses: Tensor | None,
        joints: Joints | Unpacked | None,
        rows: RowsOfRanks | None,
    ) -> None:
        self._method, self._buckets, self._update_factors = method, buckets, update_factors
        indices = [i for bucket in buckets for i in bucket.params]
        if joints and joints.owners.isdisjoint(indices):
            joints = None
        if joints:
            addresses = None  # what stands for parameters or gradients is made anew at every step
        members = _Members(indices, work, group.get("batch_axes", 0), joints)
        self.params, states = members.params, members.states
        self.buffers = members.of(momentum_buffers(states, group.get("momentum", 1.0)))
        averages = [] if group.get("row_beta") is None else [state[ROWS] for state in states]
        self.rows = members.of(averages)
        self.stacks = {
            name: [tensor for bucket in buckets for tensor in getattr(bucket, name)]
            for name in ("factors", "residuals", "averages", "products")
        }
        self._steps = steps_of(members.owners, work.steps)
        self._grads = members.grads
        self._axes = method.axes(buckets)
        self._specified: Callable[..., None] | None = None
        layout = buckets[0].layout
        known: dict[str, Any] = {}
        if not layout.in_kernels:  # the operator could not tell it
            known = {"sizes": layout.sizes, "structures": layout.structures}
        if rows is not None:
            known |= {"sizes": (len(self.params[0]), *layout.sizes[1:]), "over": rows}
        if known:
            self._specified = partial(getattr(by_reference, method.name), **known)
        own = self._grads()
        alone = (
            len(buckets) == 1
            and self._specified is None
            and all(t.is_contiguous() for t in (*self.params, *own, *self.buffers))
        )
        self._kernel = (
            matrix_kernel(
                method.kernel,
                self.params,
                buckets[0].residuals,
                layout.sizes,
                layout.structures,
            )
            if alone
            else None
        )
        launched = addresses is not None and self._specified is None
        kernels = matrix_kernels(method.name, self.params) if launched else None
        plan = kernels and kernels.prepare(
            *method.tensors(self, own),
            **self._axes,
            sizes=[bucket.layout.sizes for bucket in buckets],
            update_factors=update_factors,
        )
        self._plan = PlanAtGradients(kernels, plan, members.owners, own, addresses)
        self._launch = kernels and kernels.launch

    def __call__(self, addresses: Tensor | None, group: Group, scaling: Scaling) -> None:
        refresh_products = any(bucket.products_are_stale() for bucket in self._buckets)
        steps = (self._steps(),) if self._method.counts else ()
        settings = self._method.settings(group)
        plan = self._plan.at(addresses)
        if self._launch and plan and (self._update_factors or not refresh_products):
            lr = number_or_tensor(group["lr"])
            self._launch(plan, *steps, lr, **settings, **scaling)
        else:
            tail = *steps, as_scalar_tensor(group["lr"])
            self._operate(tail, settings, refresh_products, scaling)
        # Now, since the specification counts as a write. A step that the device may skip makes no
        # new K K^T there; without an interval each does.
        if "found_inf" not in scaling or group["update_interval"] > 1:
            for bucket in self._buckets:
                bucket.note_versions()

    def _operate(
        self, tail: tuple[Tensor, ...], settings: dict[str, Any], refresh: bool, scaling: Scaling
    ) -> None:
        """The operator; tail: steps, where it counts, and lr."""
        tensors = *self._method.tensors(self, self._grads()), *tail
        switches = {"update_factors": self._update_factors, "refresh_products": refresh}
        if self._specified:
            self._specified(*tensors, **self._axes, **settings, **switches, **scaling)
        elif self._kernel and not scaling:
            self._kernel(*tensors, **settings, **switches)
        else:
            operator = getattr(torch.ops.rootfree_fused, self._method.name)
            operator(*tensors, **self._axes, **settings, **switches, **scaling)


def _ifshampoo_tensors(call: _Matrices, grads: list[Tensor]) -> tuple[Any, ...]:
    names = ("factors", "residuals", "averages", "products")
    return (call.params, grads, *(call.stacks[name] for name in names), call.buffers)


def _ifshampoo_axes(buckets: list[Bucket]) -> dict[str, Any]:
    structures = [structure for bucket in buckets for structure in bucket.layout.structures]
    return {
        "axes": [len(bucket.factors) for bucket in buckets],
        "joint_norms": [isinstance(s, Blocks) and s.joint_norm for s in structures],
    }


def _ifshampoo_settings(group: Group) -> dict[str, Any]:
    names = ("factor_lr", "factor_momentum", "damping", "momentum", "weight_decay")
    return {
        **settings_of(group, (*names, "decoupled", "maximize")),
        "batch_size": float(group["batch_size"]),
        "bound": largest_update(group["max_update"], group["batch_size"], group["damping"]),
    }


def _rootfree_shampoo_tensors(call: _Matrices, grads: list[Tensor]) -> tuple[Any, ...]:
    names = ("averages", "factors", "residuals", "products")
    return (call.params, grads, call.buffers, call.rows, *(call.stacks[name] for name in names))


def _rootfree_shampoo_settings(group: Group) -> dict[str, Any]:
    names = ("beta1", "beta2", "damping", "weight_decay", "update_rms", "row_beta", "maximize")
    return settings_of(group, names)


IFSHAMPOO = MatrixMethod(
    name="ifshampoo_",
    kernel="_ifshampoo_bf16_",
    average="factor_momentum_{}",
    structures=frozenset(structure_names.NAMES),
    undamped=matrix.UNDAMPED,
    vectors={"rmsprop": RMSPROP, "factor": RMSPROP},
    tensors=_ifshampoo_tensors,
    axes=_ifshampoo_axes,
    settings=_ifshampoo_settings,
    counts=False,
    flops_of_blocks=4,
)
ROOTFREE_SHAMPOO = MatrixMethod(
    name="rootfree_shampoo_",
    kernel="_rootfree_shampoo_bf16_",
    average="gram_{}",
    structures=frozenset({"auto", "dense", "diagonal", "dense_or_diagonal", "block"}),
    undamped=rootfree_shampoo.UNDAMPED,
    vectors={"adam": VECTOR_ADAM, "rootfree": VECTOR_ROOTFREE},
    tensors=_rootfree_shampoo_tensors,
    axes=lambda _: {},
    settings=_rootfree_shampoo_settings,
    counts=True,
    flops_of_blocks=7,
)
