"""What the optimizers share: groups and state, the step, and here how they are saved and loaded."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._groups import Group, devices_of, trains
from ._loading import (
    check_data,
    check_is_dict,
    check_named,
    check_saved,
    check_settings,
    check_sizes,
    check_state_dict,
    fresh,
    labels,
    takes,
)
from ._planning import check_state
from ._stacks import restack
from ._starts import AUTO
from ._state import (
    ADDED_LATER,
    State,
    by_place,
    copied,
    is_own,
    loaded_group,
    saved_group,
    separated,
    unstacked,
)
from ._stepping import SteppingOptimizer


class RootFreeOptimizer(SteppingOptimizer):
    """Base of the optimizers; subclasses give `_state_spec` and `_update`."""

    def __getstate__(self) -> dict[str, Any]:
        kept = {param: state for param, state in dict.items(self.state) if state}
        return {**super().__getstate__(), "state": unstacked(kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()
        for group in self.param_groups:
            restack([self.state[p] for p in group["params"] if p in self.state])
        self._watch_state()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim, but a copy, on which later steps leave no trace.

        Every parameter that trains has all of its state in it. A bfloat16 factor and its residual
        are one float32 tensor, and dtypes in groups are saved by name: what torch.distributed can
        send. State of a parameter that no group has any more is left out.

        Raises:
            ValueError, TypeError: state that does not fit its parameter or the settings, which no
                load could take.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)

        places: dict[Tensor, int] = {}
        groups = []
        for index, group in enumerate(self.param_groups):
            self._declare_and_check(index, group)
            for param in group["params"]:
                places.setdefault(param, len(places))
            groups.append({**saved_group(group), "params": [places[p] for p in group["params"]]})
        states = by_place(dict(dict.items(self.state)), places)
        saved = {key: copied(state) for key, state in states.items()}

        state_dict = {"state": saved, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _declare_and_check(self, index: int, group: Group) -> None:
        params = [p for p in group["params"] if trains(p) or dict.get(self.state, p)]
        for param, (name, spec) in zip(params, self._declare(index, group, params), strict=True):
            check_state(name, param, self.state[param], spec)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim, but every bit is kept and state is written in place.

        torch casts state to the parameter's dtype; here it keeps the dtype that the optimizer
        declared, a lossless widening is made, and a lossy one is refused.

        Args:
            state_dict: what `state_dict()` of an optimizer of this class returned.

        Raises:
            ValueError: groups, parameters, keys, shapes, dtypes or values do not fit; nothing
                changed.
            TypeError: state_dict is no dict.
        """
        check_is_dict(state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict

        check_state_dict(state_dict)
        saved_groups = deepcopy(state_dict["param_groups"])
        groups = self._merge_groups(saved_groups)
        keys = list(chain.from_iterable(g["params"] for g in saved_groups))
        owners = [(param, group) for group in groups for param in group["params"]]
        saved = state_dict["state"]
        check_named(saved, keys)
        wrappers = {key: copied(value) for key, value in saved.items() if key not in keys}
        # torch.distributed.checkpoint passes on no state of a frozen parameter: what it has stays.
        loaded = [
            (param, group, self._check_loaded(label, param, group, saved.get(key, {})))
            for key, label, (param, group) in zip(keys, labels(saved_groups), owners, strict=True)
            if saved.get(key) or (param.requires_grad and not is_lazy(param))
        ]

        self.param_groups = groups
        self._forget()
        for index, group in enumerate(groups):
            self._write_states(index, group, [(p, s) for p, own, s in loaded if own is group])
        dict.update(self.state, wrappers)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _merge_groups(self, saved_groups: list[Group]) -> list[Group]:
        """The saved groups with this optimizer's parameters."""
        check_sizes(self.param_groups, saved_groups)
        groups = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            where = f"state_dict group {index}"
            check_settings(where, type(self).__name__, group, saved)
            merged = {**group, **loaded_group(group, saved), "params": group["params"]}
            try:
                self._check_group(merged)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
            self._check_fixed(index, group, merged)
            groups.append(merged)
        return groups

    def _check_fixed(self, index: int, group: Group, merged: Group) -> None:
        """Raise a ValueError for a setting that a load must not change."""
        for name in self._fixed:
            if group[name] is not None and group[name] != merged[name]:
                raise ValueError(
                    f"{name} of group {index} is {group[name]} but the state_dict has "
                    f"{merged[name]}; build the optimizer with {name}={merged[name]}"
                )

    def _check_loaded(
        self, label: str, param: Tensor, group: Group, saved: dict[str, Any]
    ) -> State:
        """A copy of the saved state of one parameter, or a ValueError: what does not fit."""
        where = f"state_dict of parameter {label}"
        if is_lazy(param):
            raise ValueError(
                f"{where} has no parameter yet to go to: a lazy module makes it in its first call; "
                "call the model once, then load"
            )
        spec = self._full_spec(param, group)
        check_data(where, param, saved)
        saved = separated(saved, spec)
        own = {name for name in saved if is_own(name)}
        needed = spec.keys() - self._unused_state(group)
        if not needed <= own <= spec.keys():
            raise ValueError(
                f"{where} has keys {sorted(own)} where "
                f"{type(self).__name__} needs {sorted(needed)}; load a checkpoint of "
                f"{type(self).__name__} that was saved with the same settings"
            )
        present = {name: initial for name, initial in spec.items() if name in saved}
        devices = devices_of(spec, param, group)
        loaded = {
            name: fresh(spec[name], value, devices[name])
            for name, value in check_saved(where, present, saved).items()
        }
        # What a wrapper keeps here is its own: as it was saved, on the parameter's device.
        others = {name: copied(value) for name, value in saved.items() if name not in own}
        for name, value in others.items():
            others[name] = value.to(param.device) if isinstance(value, Tensor) else value
        return {**loaded, **others}

    def _write_states(self, index: int, group: Group, loaded: list[tuple[Tensor, State]]) -> None:
        """Make the states hold the loaded values, in the tensors that are there where they fit."""
        for param, values in loaded:
            state = dict.setdefault(self.state, param, {})
            spec = self._full_spec(param, group)
            # Other structures, merged axes: the checkpoint's settings come with its shapes.
            fits = all(
                takes(state[key], values[key]) if key in state else key in ADDED_LATER
                for key in spec
                if key in values
            )
            for key in [key for key in state if key not in values or (is_own(key) and not fits)]:
                del state[key]
        self._declare(index, group, [param for param, _ in loaded])
        self._shaped_by[index] = {name: group[name] for name in self._shaping}
        for param, values in loaded:
            state = self.state[param]
            for key, value in values.items():
                if is_own(key) and key in state:
                    state[key].copy_(value)
                else:
                    state[key] = value
        written = [self.state[param] for param, _ in loaded if param.numel()]
        if group["initial_square_avg"] == AUTO and self._starts.forget(index, written):
            self._prepared.forget(index)
