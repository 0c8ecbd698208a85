"""A launch that ran before gets the same arguments as by Triton's own way to it."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

from helpers.optimizers import parameters, set_grads
from triton.compiler import CompiledKernel

from bench.host import OPTIMIZERS, stubbed


def comparable(value):
    """A launcher's argument: tensors by kind, and what they hold where that is a table."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if hasattr(value, "block_shape"):
        return comparable(value.base), tuple(value.block_shape)
    return value


@pytest.fixture
def launched(monkeypatch):
    """What the driver was asked: the grid and a kernel's arguments, a list a launch."""
    calls = []

    def note(name, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        calls.append([name, x, y, z, *map(comparable, args)])

    launcher = property(lambda kernel: functools.partial(note, kernel.name))
    monkeypatch.setattr(CompiledKernel, "run", launcher)
    with stubbed():
        yield calls


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_repeated_launch_has_the_arguments_of_the_first(name, lr, launched):
    params = parameters((8, 16), (8, 16), (5,))
    optimizer = OPTIMIZERS[name](params)
    if lr == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_grads(params, 0)
    steps = []
    for t in range(4):
        optimizer.step()
        steps.append(launched[:])
        launched.clear()
        if t == 2:  # a scaler's tensors make another kind
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    steps.append(launched[:])
    assert steps[0]
    assert steps[0] == steps[1] == steps[2]
    assert steps[3] == steps[4]
    assert steps[3] != steps[2]
