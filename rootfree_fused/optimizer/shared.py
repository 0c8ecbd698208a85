"""What the optimizers with factors do so that ranks share their matrices."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import is_sharded
from .amp_and_graphs import Scaling
from .base import RootFreeOptimizer
from .checkpoint import declare_and_check, separated
from .checks import name_of
from .formats import scale_of, sent
from .groups import Group
from .holders import Replicas
from .joint import unit_of
from .owners import Cost, update_flops
from .shards import as_laid_out, as_part_of, local_state
from .sharing import Sharing, full
from .state import EVERYWHERE, Initial, State, copied, is_of_rows


class NowShared(Exception):
    """Parameters were exchanged for such as ranks share."""


class SharingOptimizer(RootFreeOptimizer):
    """Base of optimizers of which ranks share matrices: who owns what, agreement, checkpoints."""

    @property
    def _flops_of_blocks(self) -> int:
        """Of an update of a factor b x b, in b^3."""
        raise NotImplementedError

    def _sees_whole_vectors(self, group: Group) -> bool:
        """Whether what updates vectors is not by elements."""
        raise NotImplementedError

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        unknown: Mapping[str, Any],
        *,
        process_group: Any = None,
        replicas: Replicas = "share",
        update_dtype: torch.dtype | None = None,
    ) -> None:
        optimizer = weakref.ref(self)  # which owns the sharing

        def cost(param: Tensor, group: Group) -> Cost:
            owner = optimizer()
            assert owner is not None
            return owner._cost(param, group)

        self._is_shared = False
        self._sharing = Sharing(process_group, replicas, update_dtype, cost)
        super().__init__(params, defaults, unknown)

    def _cost(self, param: Tensor, group: Group) -> Cost:
        layout = unit_of(param, group).layout
        assert layout is not None
        flops = update_flops(layout, self._flops_of_blocks)
        full_spec = super()._full_spec(param, group)
        spec = [initial for key, initial in full_spec.items() if key not in EVERYWHERE]
        size = sum(math.prod(initial.shape) * initial.dtype.itemsize for initial in spec)
        return Cost(flops * math.prod(param.shape) / math.prod(layout.sizes), size)

    def _full_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        spec = super()._full_spec(param, group)
        if self._stays(param, group):
            return {
                key: replace(initial, spread=param) if is_of_rows(key) else initial
                for key, initial in spec.items()
            }
        if self._sharing.shares(param, group):  # whole, whatever part of the parameter is here
            return {
                key: initial
                if key in EVERYWHERE or initial.lies_as is None
                else replace(initial, like=None, spread=None)
                for key, initial in spec.items()
            }
        if self._sharing.has_members(param, group):
            return {
                key: initial
                if key == "step" or initial.like is not None
                else replace(initial, spread=param)
                for key, initial in spec.items()
            }
        return spec

    def _stays(self, param: Tensor, group: Group) -> bool:
        """Whether each rank has the state of its rows, and that of the other axes."""
        if not self._sharing.shares(param, group):
            return False
        self._sharing.held(param, self.param_groups)
        return self._sharing.stays(param, group)

    def _check_shared(self, name: str, param: Tensor, group: Group) -> None:
        self._sharing.check(name, param, group, by_element=not self._sees_whole_vectors(group))

    def _check_changed(self, index: int, group: Group) -> None:
        super()._check_changed(index, group)
        if self._is_shared:
            for position, param in enumerate(group["params"]):
                self._check_shared(name_of(index, position, group), param, group)

    def _spec(self, param: Tensor, group: Group, held: Iterable[str] = ()) -> dict[str, Initial]:
        spec = super()._spec(param, group, held)
        if self._keeps(param, group):
            return spec
        # The same keys on every rank, and nothing in them where another has it.
        return {
            key: initial
            if key in EVERYWHERE
            else Initial((0,), initial.dtype, optional=initial.optional)
            for key, initial in spec.items()
        }

    def _keeps(self, param: Tensor, group: Group) -> bool:
        if not self._sharing.shares(param, group) or self._stays(param, group):
            return True
        return self._sharing.held(param, self.param_groups).here

    def state_dict(self) -> dict[str, Any]:
        """As `RootFreeOptimizer.state_dict`; a collective of the ranks that share matrices.

        Raises:
            RuntimeError: not all of them have called it.
        """
        self._is_shared = self._is_shared or self._sharing.any_in(self.param_groups)
        if self._is_shared:
            self._sharing.assign(self.param_groups)
            for index, group in enumerate(self.param_groups):
                declare_and_check(self, index, group)  # before any rank waits for another
            self._sharing.meet("state_dict()")
        return super().state_dict()

    def _saved_state(self, param: Tensor, group: Group, state: Mapping[str, Any]) -> Any:
        if self._is_shared and is_sharded(state.get("factor_0")):
            own = copied(local_state(state))
            saved = sent({key: as_part_of(state[key], value) for key, value in own.items()})
            if not self._stays(param, group):
                return saved
        else:
            saved = super()._saved_state(param, group, state)
        return self._sharing.saved(param, group, saved, self._full_spec(param, group))

    def _whole_state(
        self, param: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        saved = super()._whole_state(param, group, self._gathered(param, group, saved))
        if self._sharing.shares(param, group) or not self._sharing.has_members(param, group):
            return saved
        spec = self._full_spec(param, group)
        laid = {
            key: as_laid_out(value, param) if key in spec and key != "step" else value
            for key, value in saved.items()
        }
        own = separated(local_state(laid), spec)
        of = {key: laid.get(key, laid.get(key.removesuffix("_residual"))) for key in own}
        return {key: as_part_of(of[key], value) for key, value in own.items()}

    def _without_weak_references(self) -> AbstractContextManager[None]:
        return self._sharing.without_weak_references()

    def _gathered(self, param: Tensor, group: Group, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._sharing.shares(param, group) and not self._sharing.has_members(param, group):
            return saved
        spec = self._full_spec(param, group)
        spread = {key for key, initial in spec.items() if initial.lies_as is not None}
        # In another format than here: a value and its scales may be cut at other elements.
        spread -= {key for key in spec if scale_of(key) in saved.keys() - spec.keys()}
        return {key: value if key in spread else full(value) for key, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        if self._is_shared:
            raise TypeError(
                "an optimizer whose matrices ranks share cannot be pickled or copied, since each "
                "rank has a part of its state; save state_dict()"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._is_shared = False
        self._sharing = Sharing(None, "share", None, lambda *_: Cost(0, 0))
        super().__setstate__(state)

    def _check_and_plan(self, scaling: Scaling) -> list[Any]:
        if self._is_shared:
            return self._agree_and_plan(scaling)
        try:
            return super()._check_and_plan(scaling)
        except NowShared:
            return self._agree_and_plan(scaling)

    def _agree_and_plan(self, scaling: Scaling) -> list[Any]:
        """Checked by every rank, and what a step needs of others brought here."""
        fault: Exception | None = None
        try:
            for index, group in enumerate(self.param_groups):
                self._check_to_step(index, group)
        except Exception as error:
            fault = error
        self._agree(scaling, fault)
        try:
            if fault is not None:
                raise fault
            planned = super()._check_and_plan(scaling)
        except Exception as error:
            self._sharing.begin(self.param_groups, self.state, scaling, error)
            raise
        self._sharing.begin(self.param_groups, self.state, scaling)
        return planned

    def _agree(self, scaling: Scaling, fault: Exception | None = None) -> None:
        """Have a plan for the parameters that there are, the same on all ranks."""
        if not self._sharing.has_changed(self.param_groups):
            return
        if self._sharing.has_plan:
            self._sharing.begin(self.param_groups, self.state, scaling, fault, anew=True)
            if fault is not None:
                raise fault
        try:
            self._sharing.agree(type(self).__name__, self.param_groups, fault)
        except Exception:
            if fault is not None:
                raise fault from None
            raise
        for index in range(len(self.param_groups)):
            self._prepared.forget(index)

    def _started_first(
        self, group: Group, params: list[Tensor], states: list[State]
    ) -> tuple[list[Tensor], list[State]]:
        if not self._is_shared:
            return params, states
        here = [
            i
            for i, param in enumerate(params)
            if not self._sharing.shares(param, group)
            and not self._sharing.has_members(param, group)
        ]
        return [params[i] for i in here], [states[i] for i in here]

    def _state_here(self, param: Tensor, state: State, group: Group) -> State:
        """What of a parameter's state this rank's part of a step works on."""
        return self._sharing.state_here(param, state, group) if self._is_shared else state
