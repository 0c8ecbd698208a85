"""Adam of vectors, the operator: C++ and Triton (interpreted, or on a GPU) beside float64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES
from helpers.comparison import assert_no_worse_than
from helpers.offline import on_its_device

from rootfree_fused import reference

SETTINGS = {"beta1": 0.9, "vector_beta2": 0.95, "weight_decay": 0.1, "vector_rms": 0.7}
BODIES = ["operator", "triton"]
SHAPES = [(5,), (1030,), (), (0,), (3, 700)]


@pytest.fixture(autouse=True)
def _interpreter(request):
    pytest.importorskip("triton")
    with on_its_device(request):
        yield


def step(body, params, grads, averages, squares, steps, lr=0.05, **changes):
    settings = {**SETTINGS, "maximize": False, **changes}
    lists = params, grads, averages, squares
    scalars = torch.tensor(lr, dtype=torch.float64), torch.tensor(8.0, dtype=torch.float64)
    if body == "operator":
        operator = torch.ops.rootfree_fused.vector_adam_
        operator(*lists, steps, scalars[0], batch_size=scalars[1], **settings)
    else:
        from rootfree_fused.kernels import diag

        diag.update_("vector_adam_", *lists, steps, scalars[0], batch_size=scalars[1], **settings)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float16", "float32")])
@pytest.mark.parametrize("changes", [{}, {"maximize": True, "beta1": 0.0, "vector_beta2": 0.0}])
def test_steps_are_as_near_to_float64_as_the_eager_ones(body, device, dtypes, changes):
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes)
    params = [torch.randn(s).to(device, dtype) for s in SHAPES]
    averages, squares = ([torch.zeros(s, device=device) for s in SHAPES] for _ in range(2))
    lists = params, averages, squares
    eager, truth = (
        [[t.to(to, copy=True) for t in ts] for ts in lists] for to in (None, torch.float64)
    )
    for t in range(1, 4):
        grads = [torch.randn(s).to(device, grad_dtype) for s in SHAPES]
        steps = torch.full((len(SHAPES),), float(t), device=device)
        step(body, params, grads, averages, squares, steps, **changes)
        for state in (eager, truth):
            for p, g, m, v in zip(state[0], grads, state[1], state[2], strict=True):
                settings = {**SETTINGS, **changes, "lr": 0.05}
                reference.vector_adam_(p, g, m, v, float(t), **settings)
    for actual, e, b in zip(lists, eager, truth, strict=True):
        joined = (torch.cat([t.flatten() for t in ts]) for ts in (actual, e, b))
        assert_no_worse_than(*joined)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-18, 1e15, 1e25, 3e38])
def test_no_size_of_a_gradient_explodes_or_stops_it(body, device, size):
    """Six steps of it, then steps of 1: the first ones are bounded, the last ones go on."""
    params, averages, squares = ([torch.zeros(9, device=device)] for _ in range(3))
    for t in range(1, 500):
        before = params[0].clone()
        grads = [torch.full((9,), size if t <= 6 else 1.0, device=device)]
        steps = torch.tensor([float(t)], device=device)
        step(body, params, grads, averages, squares, steps, lr=1.0, weight_decay=0.0)
        moved = (before - params[0]).abs()
        assert (moved <= 5 * SETTINGS["vector_rms"]).all()
        if body == "triton" and params[0].is_cpu and t > 8:
            return  # interpreted
    if size < 1:
        assert (moved > 0.9 * SETTINGS["vector_rms"]).all()
    else:  # v forgets it, as any average does
        assert (squares[0] < 1e-9 * min(size, 1e19) ** 2).all()
