"""What the optimizers share: groups, declared state, the load path, the step skeleton.

State is declared: a subclass says which tensors a parameter owns (`_state_spec`), and they exist
from `add_param_group` on, one tensor a key, the same keys on every step, device and rank. `step`
tensors are views of one tensor a group and device, so that counting costs one operation, not one a
parameter.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from ._capturing import check_capturable, is_capturing
from ._checks import HYPERPARAMETERS, check_hyperparameters, check_param
from ._prepared import Launch, Prepared, PreparedSteps, can_compare, fingerprint
from ._scaling import Scaling, on_host, scaling_of, steps_taken
from ._state import (
    Initial,
    State,
    by_place,
    check_named,
    check_saved,
    check_state_dict,
    initial_step,
    loaded_group,
    saved_group,
    stack_steps,
    unstacked,
)

Group = dict[str, Any]
# Parameters that have a gradient, and the gradients.
Gathered = tuple[list[Tensor], list[Tensor]]


class Work(NamedTuple):
    """A group's step: what has a gradient, and `steps`, each count with this step included."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    steps: Tensor
    scaling: Scaling


def _device(key: str, param: Tensor, group: Group) -> torch.device:
    """Where a state tensor lives: step counts stay on the host unless the device counts them."""
    on_host = key == "step" and not (group["capturable"] or group["amp_scaling"])
    return torch.device("cpu") if on_host else param.device


class RootFreeOptimizer(Optimizer):
    """Base of the optimizers; subclasses give `_state_spec` and `_update`."""

    # Settings that the state is made for.
    _fixed: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_hyperparameters({k: v for k, v in defaults.items() if v is not None})
        self._reset_caches()
        super().__init__(params, defaults)

    # For subclasses ---------------------------------------------------------------------------

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        """How each state tensor of a parameter starts, by key; `step` is the base's own."""
        raise NotImplementedError

    def _unused_state(self, group: Group) -> frozenset[str]:
        """Keys of `_state_spec` that need not exist under the group's present settings."""
        return frozenset()

    def _complete(self, group: Group) -> None:
        """Resolve settings whose default depends on the parameters."""

    def _update(self, index: int, work: Work) -> None:
        """Update parameters and states of a group in place."""
        raise NotImplementedError

    def _next_kind(self) -> Hashable:
        """What tells the next step's kernels from another's; None where it cannot be known."""
        return ()

    def _count_replay(self) -> None:
        """Note on the host that a graph took a step."""

    def _prepare(self, index: int, work: Work) -> Launch | None:
        """How to do at every step on these tensors what `_update` does, or None."""
        return None

    # Groups and declared state ----------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group and build its state; on bad input nothing is added."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}; pass a dict")
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, param in enumerate(group["params"]):
                check_param(f"params[{i}]", param)
            self._complete(group)
            self._declare(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    def _check_group(self, group: Group) -> None:
        """Check the hyperparameters of a group and require batch_size."""
        if group.get("batch_size") is None:
            raise ValueError(
                "batch_size is missing; pass it to the constructor or in every group: the number "
                "of loss terms that the gradient averages (the global batch size for a loss "
                "averaged over examples, the number of tokens for one averaged over tokens, 1 for "
                "a summed loss)"
            )
        check_hyperparameters(group)

    def _declare(self, group: Group) -> None:
        """Build the state that the group's parameters lack; what is there stays."""
        unused = self._unused_state(group)
        for param in group["params"]:
            state = self.state[param]
            for key, initial in self._full_spec(param, group).items():
                if key not in state and key not in unused:
                    state[key] = initial(_device(key, param, group))

    def _full_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        return {"step": initial_step, **self._state_spec(param, group)}

    # Step -------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; parameters without one keep their state.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if is_capturing(self.param_groups):
            self._check_capture()
        if not torch.compiler.is_compiling():
            for index, group in enumerate(self.param_groups):
                self._check_if_changed(index, group)
        scaling = scaling_of(self)
        self._prepared.forget_unless_owned(self.state)
        work = [
            self._prepared.find(index, group["params"]) or self._gather(group)
            for index, group in enumerate(self.param_groups)
        ]
        for index, (found, group) in enumerate(zip(work, self.param_groups, strict=True)):
            if isinstance(found, Prepared):
                found.run(group, scaling)
            elif found[0]:
                self._run(index, group, found, scaling)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks: whether infs and the scale are left to `step`."""
        return any(group["amp_scaling"] for group in self.param_groups)

    def _run(self, index: int, group: Group, gathered: Gathered, scaling: Scaling) -> None:
        params, grads = gathered
        states = [self.state[p] for p in params]
        if params[0].is_cpu:
            scaling = on_host(scaling)
        work = Work(params, grads, states, self._count_step(index, states, scaling), scaling)
        # Counts on several devices are gathered anew at every step.
        can_repeat = can_compare() and len(self._stacked_steps[index][1]) == 1
        launch = self._prepare(index, work) if can_repeat else None
        if launch is None:
            self._update(index, work)
        else:
            launch.run(launch.plan, group, scaling)
            self._keep(index, group, work, launch)
        ops.mark_changed(params)

    def _check_capture(self) -> None:
        """Refuse to be captured where replays would not be steps."""
        check_capturable(self.param_groups)

    def _gather(self, group: Group) -> Gathered:
        """The parameters that have a gradient, and the gradients; checked before anything moves."""
        params, grads = [], []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"a gradient of shape {tuple(grad.shape)} has layout {grad.layout}; pass dense "
                    "gradients: sparse=False in torch.nn.Embedding, or grad.to_dense()"
                )
            params.append(param)
            grads.append(grad)
        return params, grads

    def _check_if_changed(self, index: int, group: Group) -> None:
        values = list(group.values())
        known, unused = self._checked.get(index, ([], None))
        if len(values) != len(known) or not all(map(operator.is_, values, known)):
            self._check_group(group)
            if self._unused_state(group) != unused:
                self._declare(group)
            self._checked[index] = values, self._unused_state(group)

    def _count_step(self, index: int, states: list[State], scaling: Scaling) -> Tensor:
        """Add 1 to the step counts, or 0 if the step is skipped; return them as one tensor."""
        counts = [state["step"] for state in states]
        if torch.compiler.is_compiling():
            torch._foreach_add_(counts, steps_taken(scaling, counts[0].device))
            return torch.stack(counts)
        views, stacks = self._stacked_steps.get(index, ([], []))
        if len(counts) != len(views) or not all(map(operator.is_, counts, views)):
            stacks = stack_steps(states)
            self._stacked_steps[index] = [state["step"] for state in states], stacks
        for stack in stacks:
            stack.add_(steps_taken(scaling, stack.device))
        if len(stacks) == 1:
            return stacks[0]
        return torch.stack([state["step"].to(stacks[0].device) for state in states])

    def _keep(self, index: int, group: Group, work: Work, launch: Launch) -> None:
        states = [self.state[p] for p in group["params"]]
        if found := fingerprint(group["params"], states):
            prepared = Prepared(*found, states, work.params, work.steps, launch)
            self._prepared.keep(index, prepared)

    # Saving and loading -----------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was derived from settings and values, which a load replaces."""
        self._checked: dict[int, tuple[list[Any], frozenset[str] | None]] = {}

    def _reset_caches(self) -> None:
        """Drop everything derived; the next step rebuilds it from groups and state."""
        self._forget()
        self._prepared = PreparedSteps()
        self._captured_by_kind = False  # by CapturedStep
        self._stacked_steps: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": unstacked(self.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = defaultdict(dict, self.state)
        self._reset_caches()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; no tensor in it shares storage with another parameter's.

        Dtypes in groups are saved by name.

        Raises:
            ValueError: there is state of a parameter that no group has.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)

        places: dict[Tensor, int] = {}
        groups = []
        for group in self.param_groups:
            self._declare(group)
            for param in group["params"]:
                places.setdefault(param, len(places))
            groups.append({**saved_group(group), "params": [places[p] for p in group["params"]]})
        state = unstacked(by_place(self.state, places))

        state_dict = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim, but every bit is kept and state is written in place.

        torch casts state to the parameter's dtype; here it keeps the dtype that the optimizer
        declared, a lossless widening is made, and a lossy one is refused.

        Args:
            state_dict: what `state_dict()` of an optimizer of this class returned.

        Raises:
            ValueError: groups, parameters, keys, shapes or dtypes do not match; nothing changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict

        check_state_dict(state_dict)
        saved_groups = deepcopy(state_dict["param_groups"])
        groups = self._merge_groups(saved_groups)
        keys = list(chain.from_iterable(g["params"] for g in saved_groups))
        owners = [(param, group) for group in groups for param in group["params"]]
        saved = state_dict["state"]
        check_named(saved, keys)
        # torch.distributed.checkpoint passes on no state of a frozen parameter: what it has stays.
        loaded = [
            (param, group, self._check_loaded(key, param, group, saved.get(key, {})))
            for key, (param, group) in zip(keys, owners, strict=True)
            if param.requires_grad or saved.get(key)
        ]

        self.param_groups = groups
        self._forget()
        for param, group, state in loaded:
            self._write_state(param, group, state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _merge_groups(self, saved_groups: list[Group]) -> list[Group]:
        """The saved groups with this optimizer's parameters; settings that they lack stay."""
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"state_dict has groups of {saved_sizes} parameters but this optimizer has groups "
                f"of {sizes}; build the optimizer with the groups of the one that was saved"
            )
        groups = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            missing = [f"no {key}" for key in ("damping", "batch_size") if key not in saved]
            foreign = [key for key in saved if key in HYPERPARAMETERS and key not in group]
            if missing or foreign:
                raise ValueError(
                    f"state_dict group {index} has {' and '.join(missing or foreign)}, so it was "
                    f"not saved by {type(self).__name__}; load a checkpoint of "
                    f"{type(self).__name__}"
                )
            merged = {**group, **loaded_group(group, saved), "params": group["params"]}
            self._check_group(merged)
            self._check_fixed(index, group, merged)
            groups.append(merged)
        return groups

    def _check_fixed(self, index: int, group: Group, merged: Group) -> None:
        """Raise a ValueError for a setting that a load must not change."""
        for name in self._fixed:
            if group[name] != merged[name]:
                raise ValueError(
                    f"{name} of group {index} is {group[name]} but the state_dict has "
                    f"{merged[name]}; build the optimizer with {name}={merged[name]}"
                )

    def _check_loaded(self, key: Any, param: Tensor, group: Group, saved: dict[str, Any]) -> State:
        """The saved state of one parameter, or a ValueError that says what does not fit."""
        spec = self._full_spec(param, group)
        needed = spec.keys() - self._unused_state(group)
        if not needed <= saved.keys() <= spec.keys():
            raise ValueError(
                f"state_dict of parameter {key} has keys {sorted(saved)} where "
                f"{type(self).__name__} needs {sorted(needed)}; load a checkpoint of "
                f"{type(self).__name__} that was saved with the same settings"
            )
        present = {name: initial for name, initial in spec.items() if name in saved}
        return check_saved(f"state_dict of parameter {key}", present, saved)

    def _write_state(self, param: Tensor, group: Group, loaded: State) -> None:
        """Make the state hold the loaded values, in the tensors that are there where they fit."""
        state = self.state[param]
        for key in state.keys() - loaded.keys():
            del state[key]
        for key, initial in self._full_spec(param, group).items():
            if key in loaded:
                device = _device(key, param, group)
                # Other structures, merged axes: the checkpoint's settings come with its shapes.
                fits = key in state and state[key].shape == loaded[key].shape
                if not fits or state[key].device != device:
                    state[key] = initial(device)
                state[key].copy_(loaded[key])
