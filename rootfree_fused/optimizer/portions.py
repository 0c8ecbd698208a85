"""What of a step's work is this rank's: plain tensors in the place of DTensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import is_sharded, usable_gradients
from . import formats
from .amp_and_graphs import Scaling
from .base import Work
from .exchange import Wave
from .groups import Group
from .shards import local
from .sharing import Sharing
from .starts import AUTO, Waiting, waiting_members
from .state import RESIDUAL, State
from .staying import RowsOfRanks
from .unpacked import Unpacked


@dataclass
class Portion:
    """Some of a step's parameters; the others have no state in `work`, and so no update.

    wave: what ranks exchange for it, None for what is stepped by elements, whole, or by rows, on
    each. weights: what moves by what a wave brings. rows: of its only matrix, where each steps
    those that it has. local: by the parameter what stands in its place, this rank's part of a
    DTensor.
    """

    work: Work
    wave: Wave | None
    local: list[tuple[Tensor, Tensor]]
    waiting: list[Waiting]
    rows: RowsOfRanks | None = None
    weights: Weights | None = None

    def read_(self) -> None:
        """Bring the gradients, and forget the updates of the wave before."""
        for param, part in self.local:
            (part.grad,) = usable_gradients([param])
        if self.wave is not None:
            if not self.wave.is_first:
                self.wave.gather(self.wave.own_gradients(), (0, 0))
            for matrix in self.wave.owned():
                assert matrix.moved is not None
                matrix.moved.zero_()

    def release_(self) -> None:
        """Keep no gradient alive."""
        for _, part in self.local:
            part.grad = None


class Weights:
    """This rank's parts of the matrices of a wave, which move by what the owners find."""

    def __init__(self, wave: Wave, group: Group, work: Work) -> None:
        self._wave = wave
        ids = {id(matrix.param) for matrix in wave.matrices}
        here = [i for i, p in enumerate(work.params) if id(p) in ids and local(p).numel()]
        params, states = list(work.params), list(work.states)
        for i in here:
            params[i] = local(params[i].detach())
            states[i] = {k: local(v) for k, v in states[i].items() if k == RESIDUAL}
        self._unpacked = Unpacked(group, here, work._replace(params=params, states=states))
        self._parts = {id(work.params[i]): self._unpacked.params[i] for i in here}

    def write_(self, group: Group, scaling: Scaling) -> None:
        """Send what the owners found, and move this rank's parts of the parameters by it."""
        params, moves = [], []
        for matrix, moved in self._wave.scatter():
            if id(matrix.param) in self._parts:
                params.append(self._parts[id(matrix.param)])
                moves.append(moved.to(matrix.dtype))
        if params:
            self._unpacked.read_()
            move_(params, moves, group, scaling)
            self._unpacked.write_(group, scaling)


def portions(sharing: Sharing, index: int, group: Group, work: Work) -> list[Portion]:
    """The work of this rank on its own, wave by wave what it does for others, and with others."""
    if formats.are_used(group):
        work = work._replace(places=formats.places_of(index, group, work.params))
    pairs = list(zip(work.params, work.states, strict=True))
    nothing = [torch.empty(0)] * len(pairs)
    params, states = list(nothing), [State() for _ in pairs]
    parts, members = [], []
    for i, (param, state) in enumerate(pairs):
        if sharing.shares(param, group):
            continue
        params[i], states[i] = param, sharing.state_here(param, state, group)
        if is_sharded(param):
            params[i] = _part(param)
            parts.append((param, params[i]))
            if sharing.has_members(param, group) and states[i]:
                members.append(i)
    found = [_portion(work, params, states, None, parts, group, members)]
    at = {id(param): i for i, param in enumerate(work.params)}
    for wave in sharing.waves(index):
        params, states = list(nothing), [State() for _ in pairs]
        own = [m for m in wave.owned() if id(m.param) in at]
        for matrix in own:
            i = at[id(matrix.param)]
            assert matrix.moved is not None
            params[i], states[i] = matrix.moved, work.states[i]
        indices = [at[id(matrix.param)] for matrix in own]
        whole = work._replace(places=work.places and [p._replace(first=0) for p in work.places])
        found.append(_portion(whole, params, states, wave, [], group, indices))
        found[-1].weights = Weights(wave, group, work)
    for i, (param, state) in enumerate(pairs):
        if sharing.stays(param, group):
            params, states = list(nothing), [State() for _ in pairs]
            params[i], states[i] = _part(param), sharing.state_here(param, state, group)
            own_part = [(param, params[i])]
            rows = sharing.rows_of(param)
            found.append(_portion(work, params, states, None, own_part, group, [i], rows))
    return found


def _part(param: Tensor) -> Tensor:
    """This rank's part of a DTensor, with what tells how its gradient lies."""
    part = local(param.detach())
    part.grad = _like_gradient(param, part)
    return part


def _like_gradient(param: Any, part: Tensor) -> Tensor:
    """What tells how this rank's part of the gradient lies, without asking other ranks for it."""
    if param.grad.placements == param.placements:
        return usable_gradients([param])[0]
    return torch.zeros_like(part, dtype=param.grad.dtype)


def _portion(
    work: Work,
    params: list[Tensor],
    states: list[State],
    wave: Wave | None,
    parts: list[tuple[Tensor, Tensor]],
    group: Group,
    matrices: list[int],
    rows: RowsOfRanks | None = None,
) -> Portion:
    """matrices: the positions of those whose state may have to start."""
    waiting = []
    if group.get("initial_square_avg") == AUTO:
        own = [params[i] for i in matrices], [states[i] for i in matrices]
        waiting = waiting_members(group, *own, rows)
    return Portion(work._replace(params=params, states=states), wave, parts, waiting, rows)


def move_(params: list[Tensor], moves: list[Tensor], group: Group, scaling: Scaling) -> None:
    """p <- (1 - lr weight_decay) p + lr move; not in a step that the scaler skips."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.reshape(())
    if "found_inf" in scaling:  # in float64, which no 0-d tensor makes of the parameters
        kept_on = (scaling["found_inf"] == 0).to(moves[0].device, torch.float64)
        lr = lr * kept_on.reshape(())
    kept = 1 - lr * group["weight_decay"]
    wide = [p if p.dtype == m.dtype else p.to(m.dtype) for p, m in zip(params, moves, strict=True)]
    torch._foreach_mul_(wide, kept)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(moves, lr)
        torch._foreach_add_(wide, moves)
    else:
        torch._foreach_add_(wide, moves, alpha=lr)
    for param, value in zip(params, wide, strict=True):
        if value is not param:
            param.copy_(value)
