"""Whether memory may be written, and by one tensor: else an update depends on its threads."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import PLAIN

# What an error calls the tensor, the tensor, and whether a step writes it.
Named = tuple[str, Tensor, bool]


def check_written(tensors: Iterable[Named]) -> None:
    """Raise a ValueError where an element that a step writes is also one of another place.

    Tensors that are only read may share what they like with each other. As in torch, none of
    inference mode is written outside it.
    """
    placed: list[tuple[int, int, Named]] = []
    for named in tensors:
        name, tensor, written = named
        if written and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} was made in torch.inference_mode(), outside which nothing may write it; "
                "pass a copy (tensor.clone())"
            )
        if type(tensor) not in PLAIN or tensor.is_meta or not tensor.numel():
            continue  # without memory of its own
        first = tensor.data_ptr()
        if tensor.is_contiguous():
            placed.append((first, first + tensor.nbytes, named))
            continue
        if written and not _nests(tensor) and _repeats(tensor):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so that "
                "some of its elements are one in memory; pass a copy (tensor.clone())"
            )
        placed.append((first, first + _extent(tensor), named))
    placed.sort(key=operator.itemgetter(0))
    # Of what is open at an address, only tensors that reach beyond it can meet the next.
    reach = 0
    open_: list[tuple[int, int, Named]] = []
    for item in placed:
        open_ = [other for other in open_ if other[1] > item[0]] if reach > item[0] else []
        for other in open_:
            if (item[2][2] or other[2][2]) and _meet(item[2][1], other[2][1]):
                raise ValueError(
                    f"{item[2][0]} shares memory with {other[2][0]}: one step would write it "
                    "twice, or write what it reads; pass one of them, or a copy (tensor.clone())"
                )
        open_.append(item)
        reach = max(reach, item[1])


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()


def _repeats(tensor: Tensor) -> bool:
    """Whether two elements are one in memory."""
    offsets = _offsets(tensor)
    return len(offsets.unique()) < len(offsets)


def _nests(tensor: Tensor) -> bool:
    """Whether each axis steps over all of the faster ones: then no two elements meet."""
    reach = 1
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True


def _meet(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose ranges of addresses overlap have an element in common."""
    dense = [_extent(t) == t.numel() * t.element_size() for t in (tensor, other)]
    if all(dense):
        return True
    start = min(tensor.data_ptr(), other.data_ptr())
    pair = tensor, other
    unit = math.gcd(*(n for t in pair for n in (t.element_size(), t.data_ptr() - start)))
    units = [
        torch.cat([_offsets(t) * size + (t.data_ptr() - start) // unit + k for k in range(size)])
        for t, size in ((t, t.element_size() // unit) for t in pair)
    ]
    return bool(torch.isin(*units).any())


def _offsets(tensor: Tensor) -> Tensor:
    """Where the elements lie, counted in elements from the first."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, device="cpu") * stride
        offsets = (offsets[:, None] + steps).flatten()
    return offsets
