"""csrc/known_tensors.cpp from Python, much slower: for where it was not built for this torch."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import PLAIN
from .shards import local

# Where a tensor's elements lie: address (of one device alone), shape, strides and dtype.
_Lies = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _look(tensor: Any) -> _Lies | None:
    """None for a tensor that is no plain strided one."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return None
    dtype = tensor.dtype
    if dtype.is_complex:  # and may be a view that is computed
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), dtype


class _Fingerprint:
    """What was seen of tensors, which it keeps, so that none of their ids is used again."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.seen: list[Any] = []

    def add(self, tensor: Tensor) -> bool:
        self.tensors.append(tensor)
        self.seen.append(_look(tensor))
        return self.seen[-1] is not None

    def add_gradient(self, grad: Tensor | None, addresses: array[int]) -> bool:
        """Apart from its address, which a new backward may change."""
        if grad is None:
            self.seen.append(None)
            return True
        look = _look(grad)
        if look is not None:
            addresses.append(look[0])
            self.seen.append(look[1:])
        return look is not None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Fingerprint)
            and self.seen == other.seen
            and len(self.tensors) == len(other.tensors)
            and all(map(operator.is_, self.tensors, other.tensors))
        )

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.tensors)))


def fingerprint(
    params: Sequence[Tensor], states: Sequence[Mapping[Any, Any]]
) -> tuple[_Fingerprint, bytes] | None:
    """What an update depends on beside the values, and where gradients lie; None if strange."""
    if len(params) != len(states):
        return None
    found, grads = _Fingerprint(), array("q")
    for param, state in zip(params, states, strict=True):
        if not found.add(param):
            return None
        grad = param.grad
        if not found.add_gradient(grad, grads):
            return None
        if grad is not None:
            for value in state.values():
                if isinstance(value, Tensor) and not found.add(value):
                    return None
    return found, grads.tobytes()


def unchanged(
    params: Sequence[Tensor], states: Sequence[Mapping[Any, Any]], known: _Fingerprint
) -> bytes | None:
    """Where the gradients lie, or None where anything else changed."""
    found = fingerprint(params, states)
    return found[1] if found is not None and found[0] == known else None


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Those that there are, of DTensors what this rank has of them."""
    return [local(param.grad) for param in params if param.grad is not None]


def has_values(mapping: dict[Any, Any], values: Sequence[Any]) -> bool:
    """Whether the values of the dict are these objects, in this order."""
    found = list(dict.values(mapping))
    return len(found) == len(values) and all(map(operator.is_, found, values))


def mark_changed(params: Sequence[Tensor]) -> None:
    torch.autograd.graph.increment_version(params)
