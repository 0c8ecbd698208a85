"""Steps of matrices by prepared plans: the operator's to the bit, and taken where they may be."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.optimizers import assert_identical, build, parameters, set_grads, snapshot

from bench.host import as_on_cuda
from rootfree_fused.ops import extensions

pytestmark = pytest.mark.skipif(
    extensions.known_tensors() is None, reason="csrc/known_tensors.cpp is not built"
)
pytest.importorskip("triton")
SHAPES = [(8, 8), (5,), (8, 8)]  # whose K K^T are kept on the CPU too
KERNELS = {"ifshampoo": "matrix", "shampoo": "rootfree_shampoo"}
OPERATORS = {"ifshampoo": "ifshampoo_", "shampoo": "rootfree_shampoo_"}


@pytest.fixture
def operators(monkeypatch):
    """How often the operators' bodies in Triton were called: a prepared step calls none."""
    from helpers.offline import interpreted

    called = []
    for file, name in zip(KERNELS.values(), OPERATORS.values(), strict=True):
        kernels = extensions.triton(file)
        body = functools.partial(_noted, called, getattr(kernels, name))
        monkeypatch.setattr(kernels, name, body)
    with interpreted(), as_on_cuda():
        yield called


def _noted(called, body, *args, **settings):
    called.append(body)
    body(*args, **settings)


def pair(name, dtype=torch.float32, shapes=SHAPES, **overrides):
    """An optimizer, and its twin, which prepares nothing."""
    params, others = (parameters(*shapes, dtype=dtype) for _ in range(2))
    optimizer, twin = (build(name, mine, **overrides) for mine in (params, others))
    twin._prepare = lambda *_: None
    return (params, optimizer), (others, twin)


def step_both(both, operators, t, *, aligned=True, in_place=False):
    """A step of each, on equal gradients; how many operators the first called."""
    counts = []
    for params, optimizer in both:
        kept = [p.grad for p in params]
        set_grads(params, 100 + t)
        for p, grad in zip(params, kept, strict=True):
            if in_place:
                p.grad = grad.copy_(p.grad)
            elif not aligned:
                moved = torch.cat([torch.zeros(1, dtype=p.dtype), p.grad.flatten()])[1:]
                p.grad = moved.view(p.shape)
        before = len(operators)
        optimizer.step()
        counts.append(len(operators) - before)
    (params, optimizer), (others, twin) = both
    assert_identical(snapshot(optimizer, params), snapshot(twin, others))
    assert counts[1] == 1
    return counts[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ifshampoo", torch.float32), ("ifshampoo", torch.bfloat16), ("shampoo", torch.float32)],
)
def test_gradients_may_lie_anywhere(name, dtype, operators):
    """From one that does not start aligned the operator makes a copy."""
    both = pair(name, dtype)
    ways = [{}, {"in_place": True}, {"aligned": False}, {}, {"aligned": False}, {"in_place": True}]
    counts = [step_both(both, operators, t, **way) for t, way in enumerate(ways)]
    assert counts == [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_gradients_of_a_stack_move_with_it(name, operators):
    both = pair(name, shapes=[(2, 8, 8), (2, 5), (2, 8, 8)], batch_axes=1)
    ways = [{}, {}, {"aligned": False}]
    counts = [step_both(both, operators, t, **way) for t, way in enumerate(ways)]
    assert counts == [0, 0, 1]


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_settings_and_a_scaler_are_read_at_every_step(name, operators):
    both = pair(name)

    def set_all(key, value):
        for _, optimizer in both:
            optimizer.param_groups[0][key] = value

    def scale(**tensors):
        for _, optimizer in both:
            for key in ("grad_scale", "found_inf"):
                setattr(optimizer, key, tensors.get(key))

    changes = [
        lambda: set_all("lr", 0.01),
        lambda: (set_all("lr", torch.tensor(0.02, dtype=torch.float64)), set_all("damping", 0.3)),
        lambda: set_all("maximize", True),
        lambda: scale(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0)),
        lambda: scale(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0)),
        lambda: (scale(), set_all("weight_decay", 0.0)),
    ]
    for t, change in enumerate(changes):
        change()
        assert step_both(both, operators, t, in_place=t > 0) == 0


def test_rows_are_left_out_and_taken_up_again(operators):
    """A plan has the averages of rows or has not."""
    both = pair("shampoo")
    for t, row_beta in enumerate((0.95, None, 0.9, None)):
        for _, optimizer in both:
            optimizer.param_groups[0]["row_beta"] = row_beta
        assert step_both(both, operators, t, in_place=t > 0) == 0


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_between_updates_products_that_are_stale_are_the_operators(name, operators):
    both = pair(name, update_interval=2)
    counts = []
    for t in range(6):
        if t in (3, 5):
            for params, optimizer in both:
                if t == 5:
                    optimizer.load_state_dict(optimizer.state_dict())
                else:
                    optimizer.state[params[0]]["factor_0"].mul_(1.25)
        counts.append(step_both(both, operators, t, in_place=t > 0))
    assert counts == [0, 1, 0, 1, 0, 1]  # the first of a kind makes products anew


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_a_parameter_that_is_no_stack_of_aligned_memory_is_the_operators(name, operators):
    both = pair(name)
    for params, _ in both:
        strided = torch.empty(8, 8).t()
        params[0].data = strided.copy_(params[0].detach())
    assert [step_both(both, operators, t) for t in range(2)] == [1, 1]
