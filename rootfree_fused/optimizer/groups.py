"""Groups of parameters, their settings, and the state that is declared for them.

A subclass says which tensors a parameter owns (`_state_spec`). They are allocated at first touch (a
step, a read, a save), on the parameter's device of then, and have the same keys on every step,
device and rank.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..ops.checks import HYPERPARAMETERS, check_hyperparameters
from .checks import (
    COUNTED,
    check_tensor,
    has_no_values,
    lacks,
    name_of,
    refuse_misspelt,
    refuse_of_all_groups,
    refuse_unknown,
)
from .formats import received, sent
from .known_tensors import PreparedSteps
from .stacks import allocate
from .starts import AUTO, Starts
from .state import (
    ADDED_LATER,
    DeclaredState,
    Initial,
    copied,
    initial_step,
    take_apart,
    unused_state,
)

Group = dict[str, Any]


def devices_of(spec: Iterable[str], param: Tensor, group: Group) -> dict[str, torch.device]:
    """Where state tensors live: step counts stay on the host unless the device counts them."""
    counted = group["capturable"] or group["amp_scaling"]
    step = param.device if counted else torch.device("cpu")
    return {key: step if key == "step" else param.device for key in spec}


def trains(param: Any) -> bool:
    if not isinstance(param, Tensor) or is_lazy(param):
        return False
    return param.requires_grad or param.grad is not None


def _without_count(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings among these that are to be checked: a batch size may be counted later."""
    counted = isinstance(size := values.get("batch_size"), str) and size == COUNTED
    return {k: v for k, v in values.items() if k != "batch_size"} if counted else values


class DeclaringOptimizer(Optimizer):
    """An optimizer of checked groups, with declared state."""

    # Settings that decide what state there is, and of these the ones that no load may change.
    _shaping: tuple[str, ...] = ()
    _fixed: tuple[str, ...] = ()
    # Settings that came after checkpoints that lack them, and what those were stepped with.
    _added_later: Mapping[str, Any] = {}
    # What a subclass has in place of arguments of other classes, for who passes those.
    _replaced: Mapping[str, str] = {}
    # What makes a state_dict of another optimizer's, for who loads that one.
    _converters = "nothing converts one"

    def __init__(self, params: Any, defaults: dict[str, Any], unknown: Mapping[str, Any]) -> None:
        refuse_unknown(type(self), unknown, self._replaced)
        known = {k: v for k, v in defaults.items() if v is not None}
        given = self._check_settings(_without_count(known))
        self._reset_caches()
        super().__init__(params, defaults | given)

    # For subclasses ---------------------------------------------------------------------------

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        """How each state tensor of a parameter starts, by key; `step` is the base's own."""
        raise NotImplementedError

    def _keeps(self, param: Tensor, group: Group) -> bool:
        """Whether the state of a parameter is here, and not on another rank."""
        return True

    def _saved_state(self, param: Tensor, group: Group, state: Mapping[str, Any]) -> Any:
        """A copy of the state of a parameter, as a checkpoint has it."""
        return sent(copied(state))

    def _whole_state(
        self, param: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Saved state of a parameter as this optimizer's own state is laid out."""
        return received(saved, self._full_spec(param, group), param.device)

    def _gathered(self, param: Tensor, group: Group, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Saved state with whole what is whole here, a collective where ranks share it."""
        return saved

    def _without_weak_references(self) -> AbstractContextManager[None]:
        """For the time that parameters become others in place, which torch refuses with these."""
        return nullcontext()

    def _complete(self, group: Group) -> None:
        """Resolve settings whose default depends on the parameters."""

    @classmethod
    def _as_of_today(cls, saved: Group) -> Group:
        """The settings of a saved group, with those that came later as it was stepped then."""
        return {**cls._added_later, **saved}

    def _check_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings among `values` as Python's own, or an error."""
        return check_hyperparameters(values)

    def _check_taken(self, index: int, position: int, group: Group) -> None:
        """Raise where the method would be another one for the parameter at this position."""
        check_tensor(name_of(index, position, group), group["params"][position])

    # Caches -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was derived from settings and values, which a load replaces."""
        self._checked: dict[int, Group] = {}
        self._shaped_by: dict[int, Group] = {}
        # Ids of parameters whose state had momentum buffers when it was checked last.
        self._with_buffers: set[int] = set()

    def _reset_caches(self) -> None:
        """Drop everything derived; the next step rebuilds it from groups and state."""
        self._forget()
        self._unused: dict[int, frozenset[str]] = {}  # of each group as it was checked last
        self._starts = Starts()
        self._prepared = PreparedSteps()
        self._captured_by_kind = False  # by CapturedStep

    # Groups and declared state ----------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group and declare its state; on bad input nothing is added."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}; pass a dict")
        index = len(self.param_groups)
        refuse_misspelt(type(self), index, param_group, self.defaults, self._replaced)
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for position, param in enumerate(group["params"]):
                self._check_taken(index, position, group)
                if not is_lazy(param):
                    self._state_spec(param, group)
            self._complete(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._watch_state()

    def _check_group(self, group: Group) -> None:
        """Check the hyperparameters of a group and require all; they become Python's numbers."""
        refuse_of_all_groups(type(self), group)
        if "batch_size" in self.defaults and group.get("batch_size") is None:
            raise ValueError(
                "batch_size is missing; pass it to the constructor or in every group: the number "
                "of loss terms that the gradient averages (the global batch size for a loss "
                "averaged over examples, the number of tokens for one averaged over tokens, 1 for "
                "a summed loss)"
            )
        if missing := (HYPERPARAMETERS & self.defaults.keys()) - group.keys():
            name = min(missing)
            raise ValueError(f"{name} is missing; put it back, the default: {self.defaults[name]}")
        group.update(self._check_settings(_without_count(group)))
        if group.get("damping") == 0 and group.get("initial_square_avg") == AUTO:
            raise ValueError(
                "damping is 0 and initial_square_avg is 'auto': a first gradient of zero would be "
                "divided by 0; pass a damping > 0, or initial_square_avg=1"
            )
        for key in HYPERPARAMETERS & group.keys():
            if isinstance(group[key], list):  # whose changes in place nobody would see
                group[key] = tuple(group[key])

    def _watch_state(self) -> None:
        """Have the declared state allocated when it is first read."""
        owner = weakref.ref(self)

        def allocate_all() -> None:
            if (optimizer := owner()) is None:
                return
            for index, group in enumerate(optimizer.param_groups):
                optimizer._check_if_changed(index, group)
                optimizer._declare(index, group, list(filter(trains, group["params"])))

        if isinstance(self.state, DeclaredState):
            self.state.declare(allocate_all)
        else:  # torch's own, or one that someone put in its place
            self.state = DeclaredState(self.state, allocate_all)

    def _spec(self, param: Tensor, group: Group, held: Iterable[str] = ()) -> dict[str, Initial]:
        """The state that a parameter needs; what a group without momentum has `held` stays."""
        unused = unused_state(group).difference(held)
        spec = self._full_spec(param, group)
        return {key: initial for key, initial in spec.items() if key not in unused}

    def _full_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        return {"step": initial_step, **self._state_spec(param, group)}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _declare(
        self, index: int, group: Group, params: list[Tensor]
    ) -> list[tuple[str, dict[str, Initial]]]:
        """Allocate what state the parameters lack; return each one's name and what it needs."""
        self._complete(group)
        positions = {id(param): position for position, param in enumerate(group["params"])}
        states = [dict.setdefault(self.state, param, {}) for param in params]
        held = {key for state in states for key in ADDED_LATER & state.keys()}
        needed, fresh = [], []
        for param, state in zip(params, states, strict=True):
            name = name_of(index, positions[id(param)], group)
            try:
                spec = self._spec(param, group, held)
            except ValueError as error:
                raise ValueError(f"{name} does not fit its settings: {error}") from None
            devices = devices_of(spec, param, group)
            needed.append((name, spec))
            take_apart(state, spec)
            missing = lacks(name, state, spec, complete=id(param) in self._with_buffers)
            if len(missing) == len(spec) or has_no_values(param, state, spec):
                fresh.append((state, spec, devices))
            else:
                for key in missing:
                    state[key] = spec[key](devices[key])
        self._note_buffers(group, params)
        if fresh:
            self._shaped_by.setdefault(index, {name: group[name] for name in self._shaping})
        built = allocate([spec for _, spec, _ in fresh], [devices for *_, devices in fresh])
        for (state, *_), tensors in zip(fresh, built, strict=True):
            state.update(tensors)
        return needed

    def _note_buffers(self, group: Group, params: Iterable[Tensor]) -> None:
        """Without momentum the buffers of these may go, and come back with it."""
        ids = set(map(id, params))
        self._with_buffers -= ids
        if not unused_state(group):
            self._with_buffers |= ids

    def _check_if_changed(self, index: int, group: Group) -> None:
        values = list(group.values())
        known = self._checked.get(index)
        if (
            known is None
            or len(values) != len(known)
            or not all(map(operator.is_, values, known.values()))
        ):
            self._check_changed(index, group)
        elif isinstance(group["lr"], Tensor):  # which may have been filled
            self._check_named(index, check_hyperparameters, {"lr": group["lr"]})

    def _check_changed(self, index: int, group: Group) -> None:
        self._check_named(index, self._check_group, group)
        self._check_kept(index, group)
        unused = unused_state(group)
        if self._unused.setdefault(index, unused) != unused:
            self._prepared.forget(index)
            if unused:
                self._note_buffers(group, group["params"])
        self._unused[index] = unused
        self._checked[index] = dict(group)

    def _check_named(self, index: int, check: Callable[[Group], object], values: Group) -> None:
        try:
            check(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"in group {index}, {error}") from None

    def _check_kept(self, index: int, group: Group) -> None:
        """Raise a ValueError where a setting changed that state was allocated for."""
        if not any(dict.get(self.state, param) for param in group["params"]):
            return
        for name, value in self._shaped_by.get(index, {}).items():
            if group[name] != value:
                raise ValueError(
                    f"{name} of group {index} was {value!r} when its state was allocated and "
                    f"is {group[name]!r}; set it back, or build a new optimizer"
                )
