"""State of many parameters as one tensor: of each, its state tensors are views.

The first `batch_axes` axes of a parameter, and of its state, number members: independent parameters
in all but name, whose state is stacked as theirs.
Stacks are made where state is allocated, or copied, and nobody holds it yet. Afterwards no tensor
is put in another's place: whoever holds one, or shares its memory, holds what a step works on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .amp_and_graphs import Scaling, steps_taken
from .state import STACKED, Initial, State

T = TypeVar("T")
# What the memory of a member's state tensor looks like: key, shape, dtype and device.
_Form = tuple[str, tuple[int, ...], torch.dtype, torch.device]


def allocate(
    specs: Sequence[Mapping[str, Initial]], devices: Sequence[Mapping[str, torch.device]]
) -> list[State]:
    """The declared tensors of each parameter, stacked with those that are stepped with them."""
    states: list[State] = [{} for _ in specs]
    forms = [
        [
            (k, i.shape[i.batch_axes :], i.dtype, device[k])
            for k, i in spec.items()
            if i.lies_as is None
        ]
        for spec, device in zip(specs, devices, strict=True)
    ]
    built: dict[tuple[int, str], Tensor] = {}
    for form, members in _alike(forms):
        key, *_, place = form
        shapes = [specs[i][key].shape for i in members]
        counts = [math.prod(specs[i][key].shape[: specs[i][key].batch_axes]) for i in members]
        parts = specs[members[0]][key](place, sum(counts)).split(counts)
        views = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        built |= {(i, key): view for i, view in zip(members, views, strict=True)}
    for i, (spec, device) in enumerate(zip(specs, devices, strict=True)):
        for key, initial in spec.items():
            states[i][key] = built[i, key] if (i, key) in built else initial(device[key])
    return states


def restack(states: Sequence[State], batch_axes: int) -> None:
    """Stack what `allocate` stacks, in states whose tensors nobody else holds."""
    forms = [
        [
            (
                key,
                tuple(value.shape[0 if key == "step" else batch_axes :]),
                value.dtype,
                value.device,
            )
            for key, value in state.items()
            if key == "step" or str(key).startswith(STACKED)
        ]
        for state in states
    ]
    for (key, shape, *_), members in _alike(forms):
        parts = [states[i][key].reshape(-1, *shape) for i in members]
        stack = torch.cat(parts)
        for i, part in zip(members, stack.split([len(part) for part in parts]), strict=True):
            states[i][key] = part.view(states[i][key].shape)


def _alike(forms: Sequence[list[_Form]]) -> list[tuple[_Form, list[int]]]:
    """What is one tensor: step counts of a device; the rest of those that have all of it alike."""
    members: dict[tuple[_Form, Hashable], list[int]] = defaultdict(list)
    for i, own in enumerate(forms):
        others = tuple(form for form in own if form[0] != "step")
        for form in own:
            members[form, () if form[0] == "step" else others].append(i)
    return [(form, indices) for (form, _), indices in members.items()]


def follows(last: Tensor, tensor: Tensor) -> bool:
    """Whether the second lies right behind the first in the same stack, members of its form."""
    base = tensor._base
    return (
        base is not None
        and base is last._base
        and tensor.shape[1:] == last.shape[1:]
        and tensor.dtype == last.dtype
        and tensor.storage_offset() == last.storage_offset() + last.numel()
        and tensor.is_contiguous()
        and last.is_contiguous()
    )


def as_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that follow each other, as one along their first axis."""
    first = tensors[0]
    count = sum(len(tensor) for tensor in tensors)
    return (
        first if len(tensors) == 1 else first.as_strided((count, *first.shape[1:]), first.stride())
    )


def members_of(tensors: Sequence[Tensor], batch_axes: int) -> list[Tensor]:
    """A view of each member of each tensor; without batch axes a tensor is its own."""
    for _ in range(batch_axes):
        tensors = [member for tensor in tensors for member in tensor.unbind()]
    return list(tensors)


def runs(items: Sequence[T], joined: Callable[[T, T], bool]) -> list[Sequence[T]]:
    """The items, cut between neighbours that are not joined."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(items)) if not joined(a, b)]
    return [items[first:last] for first, last in pairwise([0, *cuts, len(items)])]


def steps_of(indices: list[int], steps: Tensor) -> Callable[[], Tensor]:
    """How to read the counts of the parameters at these indices, which change in place."""
    if indices == list(range(len(steps))):
        return lambda: steps
    chosen = torch.tensor(indices, dtype=torch.long, device=steps.device)
    return lambda: steps.index_select(0, chosen)


class Counts:
    """The step counts of some parameters; `steps` has them as one tensor, as `add` left them."""

    def __init__(self, counts: Sequence[Tensor]) -> None:
        parts = runs([count.view(1) for count in counts], follows)
        self._stacks = [as_stack(part) for part in parts]
        self._copies: Sequence[Tensor] = ()
        self.steps = self._stacks[0]
        if len(parts) > 1:
            self.steps = torch.empty(len(counts), dtype=counts[0].dtype, device=counts[0].device)
            self._copies = self.steps.split([len(part) for part in parts])
            self._gather()

    def add(self, scaling: Scaling) -> None:
        """Add 1 to each, or 0 if the step is skipped."""
        for stack in self._stacks:
            stack.add_(steps_taken(scaling, stack.device))
        self._gather()

    def _gather(self) -> None:
        for copy, stack in zip(self._copies, self._stacks, strict=False):
            copy.copy_(stack)
