"""Matrices whose weights or momenta are in fewer bytes, in float32 for the time of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.formats import WEIGHT_STREAM
from . import formats
from .amp_and_graphs import Scaling
from .base import Work
from .groups import Group
from .known_tensors import reader
from .stacks import steps_of
from .state import MOMENTUM, RESIDUAL

_MOMENTUM_STREAM = 0


class _Packed:
    """Tensors of one format with what lies beside them, and the float32 that stands for them."""

    def __init__(
        self,
        stored: list[Tensor],
        beside: list[Tensor],
        values: list[Tensor],
        steps: Callable[[], Tensor],
        rounding: dict[str, Any],
    ) -> None:
        self._stored, self._beside, self._values = stored, beside, values
        self._steps, self._rounding = steps, rounding

    def read_(self) -> None:
        for value in self._values:
            value.untyped_storage().resize_(value.numel() * value.element_size())
        torch.ops.rootfree_fused.unpack_(self._values, self._stored, self._beside)

    def write_(self, scaling: Scaling) -> None:
        found_inf = scaling.get("found_inf")
        tensors = self._stored, self._beside, self._values, self._steps()
        torch.ops.rootfree_fused.pack_(*tensors, **self._rounding, found_inf=found_inf)
        for value in self._values:  # its memory is needed in no step
            value.untyped_storage().resize_(0)


class Unpacked:
    """The parameters and states of a step with matrices in float32, in the place of those that are
    in fewer bytes.

    `read_` makes these tensors before the step, `write_` stores and empties them after it. among:
    the positions of the matrices. owners: of those that have a stand-in.
    """

    def __init__(self, group: Group, among: Sequence[int], work: Work) -> None:
        params, states, steps, places = work.params, work.states, work.steps, work.places
        self.params, self.states = list(params), list(states)
        self._own, self._grads = params, dict[int, Callable[[], list[Any]]]()
        self._packed: list[_Packed] = []
        alike: dict[Any, list[tuple[int, Tensor, Tensor | None, Tensor]]] = defaultdict(list)
        for i in among:
            param, state = params[i], states[i]
            # The owner of a matrix has float32 in the place of the weight, which is not there.
            if group["param_residual"] is not None and param.dtype == torch.bfloat16:
                self.params[i] = _float32_like(param)
                own = i, param, state.get(RESIDUAL), self.params[i]
                alike[WEIGHT_STREAM, None].append(own)
            momentum = state.get(MOMENTUM)
            if momentum is not None and momentum.dtype != torch.float32:
                wide = _float32_like(momentum)
                self.states[i] = {**state, MOMENTUM: wide}
                own = i, momentum, state.get(formats.scale_of(MOMENTUM)), wide
                alike[_MOMENTUM_STREAM, momentum.dtype].append(own)
        for (stream, _), found in alike.items():
            assert places is not None
            indices, stored, beside, values = map(list, zip(*found, strict=True))
            rounding = {
                "seeds": [places[i].seed for i in indices],
                "firsts": [places[i].first for i in indices],
                "stream": stream,
            }
            others = [other for other in beside if other is not None]
            self._packed.append(_Packed(stored, others, values, steps_of(indices, steps), rounding))
        self.owners = {i for own in alike.values() for i, *_ in own}

    def read_(self, *_: Any) -> None:
        for packed in self._packed:
            packed.read_()

    def write_(self, _: Group, scaling: Scaling) -> None:
        for packed in self._packed:
            packed.write_(scaling)

    def grads(self, indices: Sequence[int]) -> list[Tensor]:
        """Of what is in these places."""
        for i in indices:
            if i not in self._grads:
                self._grads[i] = reader([self._own[i]])
        return [self._grads[i]()[0] for i in indices]


def _float32_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
