"""Parameters that are stepped as one matrix: a weight with its bias, the pair of a normalisation.

The weight, or else the first of them, owns what its factors need; each owns its momentum and count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .known_tensors import reader
from .layouts import Layout, layout_of
from .state import MOMENTUM, State


class Unit(NamedTuple):
    """What is stepped as one: its parameters, the owner first, and how they are seen together."""

    parts: tuple[Tensor, ...]
    layout: Layout | None


def unit_of(param: Tensor, group: Mapping[str, Any]) -> Unit:
    """The unit of a parameter of a group; what has no factors together is stepped apart.

    Raises:
        ValueError: the group's `combine` or another of its settings does not fit.
    """
    parts = _set_of(param, group)
    if len(parts) > 1:
        axes = group["batch_axes"]
        joint = _joint_shape([tuple(part.shape[axes:]) for part in parts])
        if joint is not None and len({part.shape[:axes] for part in parts}) == 1:
            _check_alike(parts, group)
            layout = layout_of((*param.shape[:axes], *joint), group)
            if layout is not None:
                return Unit(parts, layout)
        elif group["combine"] != "module":
            raise ValueError(
                f"combine joins {_named(parts, group)}, of shapes "
                f"{' and '.join(str(tuple(part.shape)) for part in parts)}; join a weight (o, ...) "
                "and a bias (o,), or tensors of one shape"
            )
    return Unit((param,), layout_of(param.shape, group))


def units(group: Mapping[str, Any], params: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The parts of each unit of several parameters that one of these owns."""
    if group.get("combine", "none") == "none":
        return
    for param in params:
        if not is_lazy(param):
            parts = unit_of(param, group).parts
            if len(parts) > 1 and parts[0] is param:
                yield parts


def check_gradients(group: Mapping[str, Any]) -> None:
    """Raise a ValueError where a part of a unit has a gradient and another has none."""
    for parts in units(group, group["params"]):
        missing = [part for part in parts if part.grad is None]
        if missing and len(missing) < len(parts):
            given = [part for part in parts if part.grad is not None]
            raise ValueError(
                f"{_named(given, group)} has a gradient but {_named(missing, group)}, which "
                f"combine={group['combine']!r} joins to it, has none; give both or neither, or "
                "pass combine='none'"
            )


def joined(parts: Sequence[Tensor], batch_axes: int) -> Tensor:
    """The tensors of a unit, one a part, as one: columns side by side, or along a new last axis."""
    first, *others = parts
    if not others:
        return first
    if all(other.shape == first.shape for other in others):
        return torch.stack(list(parts), -1)
    return torch.cat([first.flatten(batch_axes + 1), others[0].unsqueeze(-1)], -1)


def views(joint: Tensor, parts: Sequence[Tensor], batch_axes: int) -> list[Tensor]:
    """What of `joined(parts)` each part is, in its shape."""
    first = parts[0]
    if all(part.shape == first.shape for part in parts):
        return list(joint.unbind(-1))
    columns = joint[..., :-1].unflatten(-1, first.shape[batch_axes + 1 :])
    return [columns, joint[..., -1]]


class Joints:
    """The parameters and states of a step with each unit as one tensor, in the place of its owner.

    `read_` copies into these tensors before the step, `write_` back after it. planned: the states
    that have factors or are vectors; {} for those of parts that another owns.
    """

    def __init__(
        self, group: Mapping[str, Any], params: Sequence[Tensor], states: Sequence[State]
    ) -> None:
        self._batch_axes = group["batch_axes"]
        self.params, self.states, self.planned = list(params), list(states), list(states)
        self._grads = [reader([param]) for param in params]
        self._parts: list[Tensor] = []
        self._views: list[Tensor] = []
        positions = {id(param): i for i, param in enumerate(params)}
        for parts in units(group, params):
            owner, *others = own = [positions[id(part)] for part in parts]
            self.params[owner] = self._one(parts)
            self._grads[owner] = reader(list(parts))
            if MOMENTUM in states[owner]:
                momentum = self._one([states[i][MOMENTUM] for i in own])
                self.states[owner] = {**states[owner], MOMENTUM: momentum}
            for i in others:
                self.planned[i] = {}
        self.owners = {i for i, param in enumerate(params) if self.params[i] is not param}

    def _one(self, tensors: Sequence[Tensor]) -> Tensor:
        whole = torch.empty_like(joined(tensors, self._batch_axes))
        self._parts += tensors
        self._views += views(whole, tensors, self._batch_axes)
        return whole

    def read_(self) -> None:
        torch._foreach_copy_(self._views, self._parts)

    def write_(self) -> None:
        torch._foreach_copy_(self._parts, self._views)

    def grads(self, indices: Sequence[int]) -> list[Tensor]:
        """Of what is in these places."""
        return [joined(self._grads[i](), self._batch_axes) for i in indices]


def _set_of(param: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The parameters that `combine` names with this one, that of the most axes first."""
    combine, params = group.get("combine", "none"), group["params"]
    if combine == "none":
        return (param,)
    position = next((i for i, other in enumerate(params) if other is param), None)
    if combine == "module":
        names = group.get("param_names")
        if names is None:
            raise ValueError(
                "combine='module' pairs parameters by name; pass model.named_parameters()"
            )
        prefixes = _by_module(tuple(names))
        positions = () if position is None else prefixes[_module(names[position])]
    else:
        _check_positions(combine, len(params))
        positions = next((own for own in combine if position in own), ())
    parts = [params[i] for i in positions]
    if any(map(is_lazy, parts)):
        return (param,)  # until the module has made them
    return tuple(sorted(parts, key=lambda part: -part.dim())) or (param,)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@functools.lru_cache(maxsize=64)
def _by_module(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for position, name in enumerate(names):
        found[_module(name)] = (*found.get(_module(name), ()), position)
    return found


def _joint_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of tensors of these shapes, the owner's first, as one; None where they do not join.

    As sirfshampoo joins them.
    """
    first, *others = shapes
    if all(other == first for other in others):
        return (*first, len(shapes))
    if len(first) > 1 and others == [first[:1]]:
        return first[0], math.prod(first[1:]) + 1
    return None


def _check_positions(combine: tuple[tuple[int, ...], ...], count: int) -> None:
    positions = [i for own in combine for i in own]
    alone = any(len(own) < 2 for own in combine)
    if alone or len(set(positions)) < len(positions) or max(positions) >= count:
        raise ValueError(
            f"combine is {combine!r} in a group of {count} parameters; pass tuples of two "
            "positions or more, from 0 on, each position at most once"
        )


def _check_alike(parts: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the parts of a unit share what a step needs to be the same."""
    for what in ("dtype", "device", "requires_grad"):
        values = [getattr(part, what) for part in parts]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"combine joins {_named(parts, group)}, whose {what} is "
                f"{' and '.join(map(str, values))}; make it the same, or pass combine='none'"
            )


def _named(parts: Sequence[Tensor], group: Mapping[str, Any]) -> str:
    names = group.get("param_names", ())
    found = []
    for part in parts:
        position = next(i for i, param in enumerate(group["params"]) if param is part)
        name = f" ({names[position]})" if position < len(names) else ""
        found.append(f"parameter {position}{name}")
    return " and ".join(found)
