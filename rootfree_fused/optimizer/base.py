"""The step: every group is planned and checked first, then counted, then run.

Tensors that C++ knows again (`_prepared`) were checked when they were met first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..ops.checks import check_scaling, usable_gradients
from ..ops.overlap import check_written
from ..ops.schemas import mark_changed
from . import checkpoint
from .accumulating import AccumulatingOptimizer
from .amp_and_graphs import (
    Scaling,
    check_capturable,
    is_capturing,
    on_host,
    scaling_of,
    steps_taken,
)
from .checks import (
    check_counted,
    check_devices,
    check_gradient,
    check_state,
    memory,
    name_of,
)
from .formats import Place
from .groups import Group, devices_of
from .known_tensors import PreparedStep, PreparedUpdate, fingerprint
from .parts import Parts
from .shards import local
from .stacks import Counts, restack
from .starts import AUTO, Waiting, start_
from .state import RESIDUAL, DeclaredState, State


class Work(NamedTuple):
    """A group's step: what has a gradient, and `steps`, each count with this step included.

    places: what the random numbers of its formats are told by, where other tensors stand for the
        group's parameters.
    parts: what was accumulated beside the gradients, of all parameters; None without.
    """

    params: list[Tensor]
    states: list[State]
    steps: Tensor
    scaling: Scaling
    places: Sequence[Place] | None = None
    parts: Parts | None = None


class UnpreparedStep(NamedTuple):
    """A step on tensors that are not known again: `run` takes it after `counts` has counted it."""

    params: list[Tensor]
    counts: Counts
    run: Callable[[Group, Scaling], None]


class RootFreeOptimizer(AccumulatingOptimizer):
    """Base of the optimizers; subclasses give `_state_spec` and `_update`."""

    def _update(self, index: int, work: Work) -> None:
        """Update parameters and states of a group in place."""
        raise NotImplementedError

    def _next_kind(self) -> Hashable:
        """What tells the next step's kernels from another's; None where it cannot be known."""
        return ()

    def _kind_of_next_step(self) -> Hashable:
        """As `_next_kind`, with the groups whose step looks whether some state starts."""
        starts, kind = self._starts.kind(len(self.param_groups)), self._next_kind()
        return None if starts is None or kind is None else (starts, kind)

    def _count_replay(self) -> None:
        """Note on the host that a graph took a step."""

    def _prepare(self, index: int, work: Work) -> PreparedUpdate | None:
        """How to do at every step on these tensors what `_update` does, or None."""
        return None

    # Step -------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; parameters without one keep their state.

        Where `accumulate` was called since the last step, the gradients are the means of what it
        took. All groups are checked first: on an error nothing has moved, no count and no state.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        scaling = scaling_of(self)
        if self._accumulated.count:
            self._step_accumulated(scaling)
        elif torch.compiler.is_compiling():
            self._step_traced(scaling)
        else:
            self._take_step(scaling)
        return loss

    def _take_step(self, scaling: Scaling) -> None:
        planned = [
            (group, step, on_host(scaling) if scaling and step.params[0].is_cpu else scaling)
            for group, step in self._check_and_plan(scaling)
        ]
        for _, step, own_scaling in planned:
            step.counts.add(own_scaling)
        for group, step, own_scaling in planned:
            step.run(group, own_scaling)

    @_disable_dynamo
    @torch.no_grad()
    def _step_accumulated(self, scaling: Scaling) -> None:
        """A step on the means of what was accumulated, which then is taken."""
        accumulated = self._accumulated
        self._check_micro_batches(scaling)
        if not accumulated.are_grads:
            accumulated.put()
        try:
            self._take_step(accumulated.scaled(scaling))
        finally:
            if not accumulated.are_grads:
                accumulated.give_back()
        accumulated.forget()

    @torch.no_grad()
    def forget_residuals(self) -> None:
        """Take bfloat16 weights for what they are, without what their residuals add.

        For weights that something else wrote than `step`: an average of weights that was swapped
        in, a model's checkpoint that was loaded alone. A residual that is kept there adds up to
        half a bfloat16 step to each.
        """
        for state in dict.values(self.state):
            if RESIDUAL in state:
                local(state[RESIDUAL]).zero_()

    def _check_and_plan(
        self, scaling: Scaling
    ) -> list[tuple[Group, PreparedStep | UnpreparedStep]]:
        """What each group's step will do, after a check of all that it depends on."""
        if is_capturing(self.param_groups):
            self._check_capture()
        for index, group in enumerate(self.param_groups):
            self._check_to_step(index, group)
            self._check_parts(index, group)
        if scaling:
            check_scaling(scaling.get("grad_scale"), scaling.get("found_inf"))
        return self._plan(scaling)

    def _check_to_step(self, index: int, group: Group) -> None:
        """Check the settings of a group that is to be stepped by them."""
        self._check_if_changed(index, group)
        check_counted(index, group)

    def _plan(self, scaling: Scaling) -> list[tuple[Group, PreparedStep | UnpreparedStep]]:
        """What each group's step will do; tensors that are not known are checked first."""
        if not isinstance(self.state, DeclaredState):
            self._watch_state()
        assert isinstance(self.state, DeclaredState)
        self.state.fill()
        self._prepared.forget_unless_owned(self.state)
        known = [
            self._prepared.find(index, group["params"], self._buffers_made(group))
            for index, group in enumerate(self.param_groups)
        ]
        if all(known):
            return [(g, step) for g, step in zip(self.param_groups, known, strict=True) if step]
        gathered = [
            self._gather(index, group) if step is None else step.params
            for index, (group, step) in enumerate(zip(self.param_groups, known, strict=True))
        ]
        self._check_written(gathered)
        return [
            (group, step or self._build(index, group, params, scaling))
            for index, (group, step, params) in enumerate(
                zip(self.param_groups, known, gathered, strict=True)
            )
            if params
        ]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks: whether infs and the scale are left to `step`."""
        self._check_before_scaler()
        return any(group["amp_scaling"] for group in self.param_groups)

    def _check_capture(self) -> None:
        """Refuse to be captured where replays would not be steps."""
        check_capturable(self.param_groups)

    def _gather(self, index: int, group: Group) -> list[Tensor]:
        """The parameters that have a gradient, after a check of all that a step works on."""
        params = []
        for position, param in enumerate(group["params"]):
            if isinstance(param, Tensor) and param.grad is None:
                continue
            self._check_taken(index, position, group)
            check_gradient(name_of(index, position, group), param, param.grad)
            params.append(param)
        check_devices(index, group, params)
        for param, (name, spec) in zip(params, self._declare(index, group, params), strict=True):
            state, devices = self.state[param], devices_of(spec, param, group)
            check_state(name, param, state, spec)
            for key, device in devices.items():
                if state[key].device != device:  # the parameter has gone there
                    state[key] = state[key].to(device)
        return params

    def _check_written(self, gathered: list[list[Tensor]]) -> None:
        """Raise a ValueError for memory that a step may not write, or would twice."""
        check_written(
            named
            for index, (group, params) in enumerate(zip(self.param_groups, gathered, strict=True))
            if params
            for position, param in enumerate(group["params"])
            if param.grad is not None
            for named in memory(name_of(index, position, group), param, self.state[param])
        )

    def _build(
        self, index: int, group: Group, params: list[Tensor], scaling: Scaling
    ) -> PreparedStep | UnpreparedStep:
        states = [self.state[p] for p in params]
        counts = self._prepared.counts(index, [state["step"] for state in states])
        if params[0].is_cpu:
            scaling = on_host(scaling)
        work = Work(
            params, states, counts.steps, scaling, parts=self._accumulated.of(group, params)
        )
        launch = self._prepare(index, work)

        starts = self._starts.waiting(index, group, *self._started_first(group, params, states))
        if launch is not None and starts:
            launch = self._starting(starts, launch)

        def run(group: Group, scaling: Scaling) -> None:
            if launch is None:
                self._starts.start_(starts, group, scaling)
                self._update(index, work)
            else:
                launch.run(launch.plan, group, scaling)
            mark_changed(params)

        owned = [dict.get(self.state, p, {}) for p in group["params"]]
        if launch is None or not (found := fingerprint(group["params"], owned)):
            return UnpreparedStep(params, counts, run)
        made = self._buffers_made(group)
        prepared = PreparedStep(*found, owned, params, counts, launch, made)
        self._prepared.keep(index, prepared)
        return prepared

    def _started_first(
        self, group: Group, params: list[Tensor], states: list[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Those whose gradients are there before the update."""
        return params, states

    def _starting(self, waiting: list[Waiting], launch: PreparedUpdate) -> PreparedUpdate:
        """The launch, after a look whether what waits for a gradient starts with this one."""
        optimizer = weakref.ref(self)  # which will own the launch

        def run(plan: Any, group: Group, scaling: Scaling) -> None:
            if waiting:
                owner = optimizer()
                assert owner is not None
                owner._starts.start_(waiting, group, scaling)
            launch.run(plan, group, scaling)

        return launch._replace(run=run)

    def _step_traced(self, scaling: Scaling) -> None:
        """The step as torch.compile sees it, which guards the tensors itself."""
        for index, group in enumerate(self.param_groups):
            check_counted(index, group)
            self._check_parts(index, group)
        self._check_traced()
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            if not all("step" in state for state in states):
                self._declare_untraced(index, group, params)
                states = [self.state[p] for p in params]
            counts = [state["step"] for state in states]
            own_scaling = on_host(scaling) if params[0].is_cpu else scaling
            torch._foreach_add_(counts, steps_taken(own_scaling, counts[0].device))
            if group.get("initial_square_avg") == AUTO:  # what has started, only the device knows
                self._start_traced(params, states, group, own_scaling)
            self._update(index, Work(params, states, torch.stack(counts), own_scaling))

    def _check_traced(self) -> None:
        """Raise for gradients that no step may take, before a count moves."""

    def _start_traced(
        self, params: list[Tensor], states: list[State], group: Group, scaling: Scaling
    ) -> None:
        for state, grad in zip(states, usable_gradients(params), strict=True):
            start_(state, grad, group, scaling)

    @_disable_dynamo
    def _declare_untraced(self, index: int, group: Group, params: list[Tensor]) -> None:
        """Allocate what was emptied since the compiled step ran, at the cost of a break in it."""
        self._declare(index, group, params)

    # Copies and checkpoints --------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        kept = {param: state for param, state in dict.items(self.state) if state}
        return {**super().__getstate__(), "state": checkpoint.unstacked(kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_accumulation()
        self._reset_caches()
        for group in self.param_groups:
            owned = [self.state[p] for p in group["params"] if p in self.state]
            restack(owned, group.get("batch_axes", 0))
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
        return checkpoint.state_dict(self)

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
        checkpoint.load_state_dict(self, state_dict)
