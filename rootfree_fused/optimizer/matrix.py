"""MatrixOptimizer: what the optimizers with factors share: stacks, schedules, known calls."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy

from ..ops.by_reference import skips
from ..ops.checks import check_hyperparameters, is_sharded
from . import formats
from .amp_and_graphs import Scaling
from .base import Work
from .buckets import BucketPlan, Stacks
from .checks import check_state, check_whole, name_of
from .factor_state import default_dtype
from .groups import Group
from .joint import Joints, check_gradients, unit_of
from .known_tensors import Call, PreparedUpdate, addresses_of_grads, at_addresses
from .layouts import BLOCK_SIZE, names_in
from .matrix_calls import KnownCalls, MatrixMethod, planned_calls
from .parts import kind_of
from .portions import Portion, portions
from .schedule import FactorSchedule, UpdatesFactors, check_capturable_schedules
from .shared import NowShared, SharingOptimizer
from .starts import start_, waiting_members
from .state import State
from .staying import RowsOfRanks


class MatrixOptimizer(SharingOptimizer):
    """Base of the optimizers whose parameters have factors; a subclass names its method."""

    _matrix_method: MatrixMethod
    _fixed = ("factor_dtype",)
    _added_later: Mapping[str, Any] = {
        "batch_axes": 0,
        "combine": "none",
        "block_size": BLOCK_SIZE,
        **formats.BEFORE,
    }

    @classmethod
    def _as_of_today(cls, saved: Group) -> Group:
        """Before there were blocks, "auto" was diagonal above max_dense_dim."""
        group = super()._as_of_today(saved)
        if "block_size" in saved or "structures" not in saved:
            return group

        def then(name: Any) -> Any:
            return "dense_or_diagonal" if name == "auto" else name

        names = saved["structures"]
        several = isinstance(names, (tuple, list))
        return {**group, "structures": tuple(map(then, names)) if several else then(names)}

    def _check_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return check_hyperparameters(values, self._matrix_method.undamped)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        chosen, methods = group["vector_method"], self._matrix_method.vectors
        if chosen not in methods:
            raise ValueError(f"vector_method is {chosen!r}; pass {' or '.join(map(repr, methods))}")
        refused = names_in(group["structures"]) - self._matrix_method.structures
        if refused:
            raise ValueError(
                f"structures is {group['structures']!r} but {type(self).__name__} has "
                f"{', '.join(sorted(self._matrix_method.structures))} alone: the inverse of an "
                "average is not of the other structures; pass one of these, or use IFShampoo"
            )

        self._check_formats(group)

    def _check_formats(self, group: Group) -> None:
        """Raise for what formats do not go together with."""
        if not formats.are_used(group):
            return
        vectors = self._matrix_method.vectors[group["vector_method"]]
        if group["combine"] != "none":
            raise ValueError(
                f"combine is {group['combine']!r} in a group with a param_residual or a "
                "state_format, whose formats are of one parameter each; pass combine='none'"
            )
        if vectors.by_tensor and group["batch_axes"]:
            raise ValueError(
                f"vector_method is {group['vector_method']!r} and batch_axes {group['batch_axes']} "
                "in a group with a param_residual or a state_format; pass vector_method='adam'"
            )

    def _complete(self, group: Group) -> None:
        params = [p for p in group["params"] if isinstance(p, Tensor) and not p.is_meta]
        if group["factor_dtype"] is None and params:
            group["factor_dtype"] = default_dtype(params[0])

    def _forget(self) -> None:
        super()._forget()
        self._schedule = FactorSchedule()

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._plans: dict[int, BucketPlan] = {}
        self._stacks: dict[int, Stacks] = {}
        self._had_matrices: dict[int, bool] = {}

    @property
    def _flops_of_blocks(self) -> int:
        return self._matrix_method.flops_of_blocks

    def _sees_whole_vectors(self, group: Group) -> bool:
        return self._matrix_method.vectors[group["vector_method"]].by_tensor

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._had_matrices[len(self.param_groups) - 1] = _has_matrices(group["params"])
        self._is_shared = self._is_shared or self._sharing.any_in([group])

    def _gather(self, index: int, group: Group) -> list[Tensor]:
        if not self._is_shared and self._sharing.any_in([group]):
            self._is_shared = True
            raise NowShared
        self._check_named(index, check_gradients, group)
        params = super()._gather(index, group)
        if params and self._had_matrices.get(index) and not _has_matrices(group["params"]):
            raise TypeError(
                f"the parameters of group {index} were exchanged for vectors (the first of shape "
                f"{tuple(params[0].shape)}), as sharding flattened parameters does (DeepSpeed "
                "ZeRO): without their axes they have no factors, and the method would be another "
                "one; use DistributedDataParallel, or ZeroRedundancyOptimizer to shard the state, "
                "or RootFreeRMSprop"
            )
        return params

    def _check_parts(self, index: int, group: Group) -> None:
        super()._check_parts(index, group)
        if kind_of(group) is not None:
            for position in range(len(group["params"])):
                _check_second_moment(index, position, group)

    def _check_taken(self, index: int, position: int, group: Group) -> None:
        super()._check_taken(index, position, group)
        name, param = name_of(index, position, group), group["params"][position]
        if kind_of(group) is not None:
            _check_second_moment(index, position, group)
        check_whole(name, param)
        self._check_shared(name, param, group)
        in_parts = is_sharded(param) and not self._sharing.shares(param, group)
        formats.check_formats(name, param, group, in_parts)

    def _portions(self, index: int, work: Work) -> list[Portion]:
        """What of a step's work is this rank's, wave by wave; first what it shares with none."""
        group = self.param_groups[index]
        return portions(self._sharing, index, group, work)

    def _step_portions(
        self, index: int, work: Work, shared: list[Portion], known: list[KnownCalls]
    ) -> None:
        """Update a group of which other ranks have matrices."""
        group = self.param_groups[index]
        if _waits(group, work.scaling):
            return
        updates_factors = self._schedule.at(index, group, work.steps)
        of_owner = {**group, "lr": 1.0, "weight_decay": 0.0}
        for portion, calls in zip(shared, known, strict=True):
            portion.read_()
            if portion.waiting:
                self._starts.start_(portion.waiting, group, work.scaling)
            own = portion.work._replace(scaling=work.scaling)
            for call in self._calls(index, updates_factors, own, calls, None, portion.rows):
                call(None, group if portion.weights is None else of_owner, work.scaling)
            if portion.weights is not None:
                portion.weights.write_(group, work.scaling)
            portion.release_()

    # Step --------------------------------------------------------------------------------------

    @_disable_dynamo
    def _start_traced(
        self, params: list[Tensor], states: list[State], group: Group, scaling: Scaling
    ) -> None:
        for one in waiting_members(group, *self._started_first(group, params, states)):
            start_(one.state, one.grad(group), group, scaling, one.layout)

    def _check_traced(self) -> None:
        if self._is_shared:
            self._agree_traced()
        if any(group["combine"] != "none" for group in self.param_groups):
            self._check_joined()

    @_disable_dynamo
    def _agree_traced(self) -> None:
        self._agree({})
        self._sharing.begin(self.param_groups, self.state, {})

    @_disable_dynamo
    def _check_joined(self) -> None:
        for index, group in enumerate(self.param_groups):
            self._check_named(index, check_gradients, group)

    @_disable_dynamo
    def _update(self, index: int, work: Work) -> None:
        group = self.param_groups[index]
        for param, state in zip(work.params, work.states, strict=True):
            check_state("a parameter", param, state, self._spec(param, group))
        if self._is_shared:
            shared = self._portions(index, work)
            self._step_portions(index, work, shared, [KnownCalls() for _ in shared])
        else:
            self._step(index, work, KnownCalls())

    def _prepare(self, index: int, work: Work) -> PreparedUpdate:
        without = work._replace(scaling={})  # without the scaler's tensors
        if self._is_shared:
            return self._prepare_shared(index, without)
        known = KnownCalls()
        group = self.param_groups[index]
        addresses = addresses_of_grads(work.params)
        if not _waits(group, work.scaling):
            after = self._schedule.after(index, group, work.steps)
            self._calls(index, after, work, known, addresses)
        optimizer = weakref.ref(self)  # which will own the launch

        def update(addresses: Tensor | None, group: Group, scaling: Scaling) -> None:
            owner = optimizer()
            assert owner is not None
            owner._step(index, without._replace(scaling=scaling), known, addresses)

        return at_addresses(addresses, update)

    def _prepare_shared(self, index: int, work: Work) -> PreparedUpdate:
        shared = self._portions(index, work)
        known = [KnownCalls() for _ in shared]
        optimizer = weakref.ref(self)  # which will own the launch

        def update(_: None, group: Group, scaling: Scaling) -> None:
            owner = optimizer()
            assert owner is not None
            owner._step_portions(index, work._replace(scaling=scaling), shared, known)

        return PreparedUpdate(None, update, None)

    def _step(
        self, index: int, work: Work, known: KnownCalls, addresses: Tensor | None = None
    ) -> None:
        """Update a group; `known` are the calls on these tensors, which take the addresses."""
        group = self.param_groups[index]
        if _waits(group, work.scaling):
            return  # what is updates_factors next and which K K^T are stale stays as it was
        updates_factors = self._schedule.at(index, group, work.steps)
        for call in self._calls(index, updates_factors, work, known, addresses):
            call(addresses, group, work.scaling)

    def _calls(
        self,
        index: int,
        updates_factors: UpdatesFactors,
        work: Work,
        known: KnownCalls,
        addresses: Tensor | None,
        rows: RowsOfRanks | None = None,
    ) -> list[Call]:
        """The operator's calls of such a step, from those known for the group's stacks.

        rows: of its only matrix, where other ranks have the others.
        """
        group = self.param_groups[index]
        kind = updates_factors, group.get("row_beta") is None
        if known.stacks is not self._stacks.get(index):
            known.by_kind.clear()
        if kind not in known.by_kind:
            stacks = self._stacked(index, work.states)
            if stacks is not known.stacks:
                known.by_kind.clear()
            if known.joints is None and group["combine"] != "none":
                known.joints = Joints(group, work.params, work.states)
            joints = known.joints if known.joints and known.joints.owners else None
            plan = stacks.plan(joints.planned if joints else work.states, updates_factors)
            calls = planned_calls(
                self._matrix_method,
                index,
                group,
                updates_factors,
                work,
                plan,
                addresses,
                joints,
                rows,
            )
            known.stacks, known.by_kind[kind] = stacks, (plan, calls)
        self._plans[index], calls = known.by_kind[kind]
        return calls

    def _stacked(self, index: int, states: list[State]) -> Stacks:
        """The stacks of a group's state, as long as its tensors are what they were."""
        stacks = self._stacks.get(index)
        if stacks is None or not stacks.hold(states):
            group = self.param_groups[index]
            owned = [
                (own, p)
                for p in group["params"]
                if (state := dict.get(self.state, p)) and (own := self._state_here(p, state, group))
            ]
            stacks = self._stacks[index] = Stacks(
                [state for state, _ in owned],
                [unit_of(p, group).layout for _, p in owned],
                self._matrix_method.average,
                group["update_interval"],
                group["batch_axes"],
            )
        return stacks

    def _next_kind(self) -> Hashable:
        kinds: list[Hashable] = []
        for index, group in enumerate(self.param_groups):
            plan = self._plans.get(index)
            if plan is None:
                return None
            if group["update_interval"] > 1:
                updates_factors = self._schedule.after_last(index, group)
                stale = any(bucket.products_are_stale() for bucket in plan.buckets)
                if stale or updates_factors is None:
                    return None
                kinds.append(updates_factors)
        return tuple(kinds)

    def _count_replay(self) -> None:
        self._schedule.count_replay()

    def _check_capture(self) -> None:
        super()._check_capture()
        if self._is_shared:
            raise RuntimeError(
                "step() was called under CUDA graph capture with matrices that ranks share, whose "
                "messages it reads on the host; step without a graph"
            )
        check_capturable_schedules(self.param_groups, by_kind=self._captured_by_kind)


def _check_second_moment(index: int, position: int, group: Group) -> None:
    """Raise a ValueError for a matrix that is to follow more of micro-batches than their mean."""
    param = group["params"][position]
    if not is_lazy(param) and unit_of(param, group).layout is not None:
        raise ValueError(
            f"second_moment is {group['second_moment']!r} but {name_of(index, position, group)} is "
            "a matrix: for matrices only 'batch', since each micro-batch would cost an update of "
            "the factors; put vectors into a group of their own"
        )


def _has_matrices(params: list[Tensor]) -> bool:
    return any(is_lazy(p) or sum(size != 1 for size in p.shape) > 1 for p in params)


def _waits(group: Group, scaling: Scaling) -> bool:
    """Whether a step that the scaler skips leaves the schedule as it is."""
    return group["update_interval"] > 1 and skips(scaling.get("found_inf"))
