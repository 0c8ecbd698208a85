"""Where state starts: at the scale of a tensor's first gradient.

With `initial_square_avg="auto"` the second moment of a tensor, s itself or the factors, is exactly
zero until its gradient is not. A step on a zero gradient leaves it zero and moves nothing, so that
what has not started can be read off the state, in a checkpoint too. Only the device knows it: the
host learns it without waiting, and looks no more at a tensor that has started.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.checks import is_sharded, usable_gradients
from ..ops.methods import second_moments
from ..reference import initial_scale, mean_square, split
from ..reference.formats import encoded
from ..reference.structures import structure_of
from .amp_and_graphs import Scaling
from .formats import scale_of
from .joint import joined, unit_of
from .layouts import Layout
from .shards import local, over_ranks
from .state import MOMENTUM, STACKED, State
from .staying import RowsOfRanks

AUTO = "auto"
_Member = tuple[int, ...]  # its place along the batch axes, () without


class Waiting(NamedTuple):
    """A member of a parameter, or of several that are one, whose state may not have started yet."""

    parts: tuple[Tensor, ...]
    member: _Member
    state: State  # of the member
    held: Tensor  # of all members, what is zero until they start
    layout: Layout | None
    rows: RowsOfRanks | None = None  # of a matrix of which other ranks have the others

    def grad(self, group: Mapping[str, Any]) -> Tensor:
        """Of the member."""
        return joined(usable_gradients(self.parts), group.get("batch_axes", 0))[self.member]


class _Asked(NamedTuple):
    """What the host will know when the device has come to `event`."""

    event: Any
    flags: Tensor
    asked: list[tuple[Tensor, _Member]]


class Starts:
    """Which tensors have started, as far as the host knows."""

    def __init__(self) -> None:
        self._started = WeakTensorKeyDictionary()  # of what `_second_moment` gives: which members
        self._waiting: dict[int, list[Waiting]] = {}
        self._asked: list[_Asked] = []

    def waiting(
        self, index: int, group: Mapping[str, Any], params: list[Tensor], states: list[State]
    ) -> list[Waiting]:
        """Those that may not have started; `start_` takes from the list what it starts."""
        auto = group.get("initial_square_avg") == AUTO
        found = waiting_members(group, params, states) if auto else []
        self._waiting[index] = found
        self._drop_started(found)
        return found

    def forget(self, index: int, states: list[State], batch_axes: int) -> bool:
        """See whether states that were written have started; whether some have not."""
        owned = [state for state in states if not state.keys() <= {"step", MOMENTUM}]
        unknown = [state for state in owned if not _all_started(state, batch_axes)]
        for state in unknown:
            held = _second_moment(state)
            for part in (held, local(held)):  # of which a rank may step its own
                self._started.pop(part, None)
        if unknown:
            self._waiting.pop(index, None)
        return bool(unknown)

    def kind(self, groups: int) -> tuple[bool, ...] | None:
        """Whether each group waits for a gradient; None where the host does not know yet."""
        self._hear()
        if self._asked or len(self._waiting) < groups:
            return None
        for waiting in self._waiting.values():
            self._drop_started(waiting)
        return tuple(bool(self._waiting[index]) for index in range(groups))

    def start_(self, waiting: list[Waiting], group: Mapping[str, Any], scaling: Scaling) -> None:
        """Start, in place, what has a gradient that is not zero."""
        self._drop_started(waiting)
        flags: dict[torch.device, list[Tensor]] = defaultdict(list)
        asked: dict[torch.device, list[tuple[Tensor, _Member]]] = defaultdict(list)
        for one in waiting:
            device = one.held.device
            started = start_(one.state, one.grad(group), group, scaling, one.layout, one.rows)
            flags[device].append(started)
            asked[device].append((one.held, one.member))
        for device in asked:
            self._ask(device, torch.stack(flags[device]), asked[device])
        self._drop_started(waiting)

    def _drop_started(self, waiting: list[Waiting]) -> None:
        self._hear()
        waiting[:] = [one for one in waiting if one.member not in self._started.get(one.held, ())]

    def _ask(
        self, device: torch.device, flags: Tensor, asked: list[tuple[Tensor, _Member]]
    ) -> None:
        if device.type == "meta":
            return  # where nothing has a value, and so nothing starts
        if device.type != "cuda":
            self._learn(flags, asked)
        elif not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                copy = flags.to("cpu", non_blocking=True)
                event.record()
            self._asked.append(_Asked(event, copy, asked))

    def _hear(self) -> None:
        """Take the answers that are there; not under capture, which no query survives."""
        if self._asked and torch.cuda.is_current_stream_capturing():
            return
        while self._asked and self._asked[0].event.query():
            _, flags, asked = self._asked.pop(0)
            self._learn(flags, asked)

    def _learn(self, flags: Tensor, asked: list[tuple[Tensor, _Member]]) -> None:
        for (held, member), started in zip(asked, flags.tolist(), strict=True):
            if started:
                self._started.setdefault(held, set()).add(member)


def declared_start(group: Mapping[str, Any]) -> float:
    """What s is filled with when it is allocated: 0 where it waits for a gradient."""
    start = group["initial_square_avg"]
    return 0.0 if start == AUTO else float(start)


def start_(
    state: State,
    grad: Tensor,
    group: Mapping[str, Any],
    scaling: Scaling,
    layout: Layout | None = None,
    rows: RowsOfRanks | None = None,
) -> Tensor:
    """Start the state in place if it has not and the gradient is not zero; whether it has started.

    Not from a gradient that is not finite, nor in a step that the scaler skips. layout: of what has
    factors. rows: of a matrix of which other ranks have the others.
    """
    held = _second_moment(state)
    started = (local(_diagonal(state, layout)) != 0).any()
    if rows is None:
        square = mean_square(grad, group["batch_size"])
    else:
        whole = group["batch_size"] * rows.mean_square_of_gradient()
        square = grad.new_full((), whole, dtype=torch.float64)
    if is_sharded(held):
        found = torch.stack([started.to(square.dtype), square * grad.numel()])
        any_started, total = over_ranks(found, held)
        key = _second_moment_key(state)
        started, square = any_started > 0, total / state[key or "factor_0"].numel()
    if "grad_scale" in scaling:
        square = square / scaling["grad_scale"].to(grad.device).reshape(()).square()
    parts = {} if layout else _held_as(state, square)
    # As s will hold it: what is 0 there starts nothing. Factors start from the damping too.
    is_zero = [value == 0 for value in parts.values()][-1] if parts else square == 0
    starts = ~started & ~is_zero & square.isfinite()
    if "found_inf" in scaling:
        starts &= (scaling["found_inf"] == 0).to(grad.device).reshape(())
    if layout is None:
        for key, value in parts.items():
            _add_(local(state[key]), value, starts)
        return started | starts
    scale = initial_scale(square, group["damping"], len(layout.sizes))
    for axis, (structure, size) in enumerate(zip(layout.structures, layout.sizes, strict=True)):
        key = f"factor_{axis}"
        parts = {key: scale}
        if f"{key}_residual" in state:
            parts = dict(zip((key, f"{key}_residual"), split(scale.float()), strict=True))
        for name, value in parts.items():
            held = state[name]
            structure.add_identity_(held, torch.where(starts, value, 0).to(held.dtype), size)
        state[f"factor_momentum_{axis}"].masked_fill_(starts, 0)  # of zero gradients before
    return started | starts


def waiting_members(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    states: Sequence[State],
    rows: RowsOfRanks | None = None,
) -> list[Waiting]:
    """All whose state has something that starts; no part that another parameter owns.

    rows: of the only parameter, of which other ranks have the others.
    """
    if rows is not None:
        (part,), (state,), layout = params, states, unit_of(rows.param, group).layout
        return [Waiting((part,), (), state, _second_moment(state), layout, rows)]
    found = []
    for param, state in zip(params, states, strict=True):
        parts, layout = unit_of(param, group) if "structures" in group else ((param,), None)
        for member in _members(param, group.get("batch_axes", 0)) if parts[0] is param else ():
            own = _state_of(state, member)
            found.append(Waiting(parts, member, own, _second_moment(state), layout))
    return found


def _members(param: Tensor, batch_axes: int) -> Iterable[_Member]:
    """Those that have any elements."""
    return product(*map(range, param.shape[:batch_axes])) if param.numel() else ()


def _state_of(state: State, member: _Member) -> State:
    """The state of one member, as views."""
    if not member:
        return state
    starts = (*STACKED, *second_moments())  # the blocks of others may run over members
    return {k: v[member] for k, v in state.items() if str(k).startswith(starts)}


def _all_started(state: State, batch_axes: int) -> bool:
    held = _second_moment(state)
    if is_sharded(held):
        return False  # of other ranks the next step learns it
    return bool(held.reshape(*held.shape[:batch_axes], -1).any(-1).all())


def _second_moment_key(state: State) -> str | None:
    """That of s; None where factors are in its place."""
    return next((key for key in second_moments() if key in state), None)


def _second_moment(state: State) -> Tensor:
    """What is zero until it starts."""
    key = _second_moment_key(state)
    if key is None:
        return state["factor_0"]
    return state.get(scale_of(key), state[key])


def _held_as(state: State, square: Tensor) -> dict[str, Tensor]:
    """What s and its scales hold for a number; last what is zero until it starts."""
    key = _second_moment_key(state)
    assert key is not None
    dtype = state[key].dtype
    if scale_of(key) in state:
        bounded = square.clamp(max=torch.finfo(torch.float32).max).float()
        code, scale = encoded(bounded.view(1), dtype)
        assert scale is not None
        return {key: code[0], scale_of(key): scale[0]}
    return {key: square.clamp(max=torch.finfo(dtype).max).to(dtype)}


def _diagonal(state: State, layout: Layout | None) -> Tensor:
    """Of it as much as tells whether it is zero: of factors the last, which no rank has in part."""
    if layout is None:
        return _second_moment(state)
    last = state[f"factor_{len(layout.sizes) - 1}"]
    return structure_of(last).diagonal(last)


def _add_(tensor: Tensor, value: Tensor, starts: Tensor) -> None:
    """Set what is zero; leave every bit of the rest."""
    tensor.add_(torch.where(starts, value, 0).to(tensor.dtype))
