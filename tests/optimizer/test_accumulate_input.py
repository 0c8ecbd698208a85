"""What `accumulate` refuses takes no gradient and moves nothing; nothing is lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.micro_batches import F32, F64, SHAPES, backward, gradients, take
from helpers.optimizers import DIAGONAL, SETTINGS, assert_identical, build, parameters, snapshot

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop

BF16 = torch.bfloat16
SQUARED = [name for name in DIAGONAL if name.startswith(("rmsprop", "adamw"))]
every_optimizer = pytest.mark.parametrize("name", SETTINGS)


# What is refused, and changes nothing ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["variance", "mean"])
@pytest.mark.parametrize("name", SQUARED)
def test_one_micro_batch_has_no_variance(name, kind):
    params = parameters(*SHAPES)
    optimizer = build(name, params, second_moment=kind)
    take(optimizer, params, gradients(2, F32))
    optimizer.step()
    before = snapshot(optimizer, params)
    words = rf"second_moment='{kind}' in group 0 needs at least 2 micro-batches a step, got 1; call"
    backward(params, gradients(1, F32)[0])
    for step in (optimizer.step, torch.compile(optimizer.step, backend="eager")):
        with pytest.raises(ValueError, match=words):
            step()
    optimizer.accumulate()
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)
    take(optimizer, params, gradients(1, F32, seed=5))  # what was there is there still
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_matrices_have_the_batch_alone():
    words = r"second_moment is 'micro' but parameter 1 \(w\) of group 0 is a matrix: .* 'batch'"
    named = [("b", torch.nn.Parameter(torch.ones(3))), ("w", torch.nn.Parameter(torch.ones(3, 2)))]
    with pytest.raises(ValueError, match=words):
        IFShampoo(named, batch_size=1, second_moment="micro")
    optimizer = IFShampoo(named, batch_size=1)
    optimizer.param_groups[0]["second_moment"] = "micro"
    params = [p for _, p in named]
    backward(params, [torch.ones(3), torch.ones(3, 2)])
    for call in (optimizer.accumulate, optimizer.step):
        with pytest.raises(ValueError, match=words):
            call()
    assert all(torch.equal(p, torch.ones_like(p)) and p.grad is not None for p in params)


def test_a_kind_that_changed_since_is_told():
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8)
    take(optimizer, params, gradients(2, F32))
    optimizer.param_groups[0]["second_moment"] = "micro"
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="of micro-batches changed since accumulate"):
        optimizer.step()
    assert_identical([p.detach() for p in params], before)
    optimizer.param_groups[0]["second_moment"] = "batch"
    optimizer.step()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"terms": 0}, ValueError, "terms is 0; pass how many there are"),
        ({"terms": 10**400}, ValueError, "terms is 1000"),
        ({"terms": 1e-25}, ValueError, "terms is 1e-25"),
        ({"terms": float("nan")}, ValueError, "terms is nan"),
        ({"terms": float("inf")}, ValueError, "terms is inf"),
        ({"terms": True}, TypeError, "terms is a bool"),
        ({"terms": torch.tensor(3)}, TypeError, r"terms is a Tensor; .* of a tensor its item\(\)"),
        ({"parts": 0}, ValueError, "parts is 0"),
        ({"parts": 1.5}, ValueError, "parts is 1.5"),
        ({"terms": 4}, ValueError, "terms was given for some micro-batches of this step and not"),
    ],
    ids=str,
)
def test_bad_counts_take_nothing(call, error, words):
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8, second_moment="micro")
    take(optimizer, params, gradients(1, F32))
    backward(params, gradients(1, F32, seed=1)[0])
    before = [p.grad.clone() for p in params]
    with pytest.raises(error, match=words):
        optimizer.accumulate(**call)
    assert_identical([p.grad for p in params], before)
    optimizer.accumulate()
    (first, second) = gradients(1, F32)[0], before
    grads = optimizer.accumulated_grads()
    assert_identical(grads, [(a + b) * 0.5 for a, b in zip(first, second, strict=True)])


def test_squares_must_fit():
    params = parameters((3,), (2,))
    optimizer = RootFreeRMSprop(params, batch_size=8, second_moment="micro")
    p, q = params
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"shape \(2,\) that is not among those with a gradient"):
        optimizer.accumulate(squares={q: torch.ones(2)}, parts=4)
    with pytest.raises(ValueError, match=r"squares has \(1,\) on cpu for a param"):
        optimizer.accumulate(squares={p: torch.ones(1)}, parts=4)
    with pytest.raises(ValueError, match="on meta for a parameter"):
        optimizer.accumulate(squares={p: torch.ones(3, device="meta")}, parts=4)
    with pytest.raises(TypeError, match="squares has a Tensor of torch"):
        optimizer.accumulate(squares={p: torch.ones(3, dtype=torch.int64)}, parts=4)
    assert p.grad is not None


def test_squares_of_parts_are_those_of_as_many_micro_batches():
    """One backward of four parts, told their squares, beside four backwards."""
    one, four = ([torch.nn.Parameter(torch.ones(5, dtype=F64))] for _ in range(2))
    settings = {"batch_size": 8, "second_moment": "variance"}
    told, taken = (RootFreeAdamW(params, **settings) for params in (one, four))
    for t in range(2):
        grads = [own[0] for own in gradients(8, F64, t, [(5,)])]
        take(taken, four, [[g] for g in grads])
        for half in (grads[:4], grads[4:]):
            one[0].grad = sum(half) / 4
            told.accumulate(squares={one[0]: sum(g**2 for g in half) / 4}, parts=4)
        told.step()
        taken.step()
    for a, b in zip(snapshot(told, one), snapshot(taken, four), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_no_gradient_no_micro_batch():
    optimizer = RootFreeRMSprop(parameters((3,)), batch_size=8)
    with pytest.raises(RuntimeError, match="no parameter has a gradient; call backward"):
        optimizer.accumulate()


def test_a_bad_gradient_takes_none():
    params = parameters((3,), (4, 2))
    optimizer = RootFreeRMSprop(params, batch_size=8)
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(TypeError, match="parameter 1 of group 0"):
        optimizer.accumulate()
    assert params[0].grad is not None
    with pytest.raises(RuntimeError, match="nothing is accumulated"):
        optimizer.accumulated_grads()


def test_a_gradient_beside_what_was_accumulated_is_told():
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8)
    take(optimizer, params, gradients(2, F32))
    params[1].grad = torch.ones(11)
    before = [p.detach().clone() for p in params]
    for call in (optimizer.step, optimizer.accumulated_grads):
        with pytest.raises(RuntimeError, match="parameter 1 of group 0 has a gradient that"):
            call()
    assert_identical([p.detach() for p in params], before)
    params[1].grad = None
    optimizer.step()


@every_optimizer
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, copy.copy])
def test_no_copy_while_something_is_accumulated(name, copied):
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    take(optimizer, params, gradients(2, F32))
    with pytest.raises(RuntimeError, match="2 micro-batches are accumulated; step"):
        copied(optimizer)
    optimizer.step()
    twin = copied(optimizer)
    if copied is copy.deepcopy:
        (own,) = (group["params"] for group in twin.param_groups)
        take(twin, own, gradients(2, F32, seed=1))
        take(optimizer, params, gradients(2, F32, seed=1))
        twin.step()
        optimizer.step()
        assert_identical(snapshot(twin, own), snapshot(optimizer, params))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_zero_grad_drops_all(set_to_none, shown):
    params, twins = (parameters(*SHAPES, dtype=BF16) for _ in range(2))
    one, other = (RootFreeAdamW(ps, batch_size=8, second_moment="micro") for ps in (params, twins))
    take(one, params, gradients(3, BF16, seed=9))
    if shown:
        one.accumulated_grads()
    one.zero_grad(set_to_none)
    assert all(p.grad is None or not p.grad.any() for p in params)
    assert all(p.grad_dtype == BF16 for p in params)
    for ps, optimizer in ((params, one), (twins, other)):
        for p in ps:
            p.grad = None
        take(optimizer, ps, gradients(2, BF16))
        optimizer.step()
    assert_identical(snapshot(one, params), snapshot(other, twins))


def test_a_parameter_that_changed_since_is_told():
    (p,) = parameters((4,))
    optimizer = RootFreeRMSprop([p], batch_size=8)
    take(optimizer, [p], [[torch.ones(4)]])
    p.data = torch.zeros(5)
    with pytest.raises(ValueError, match="changed since accumulate"):
        optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "kind": lambda o, p: o.param_groups[0].update(second_moment="micro"),
    "dtype": lambda o, p: setattr(p, "data", p.data.double()),
    "shape": lambda o, p: setattr(p, "data", torch.zeros(3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_change_between_micro_batches_is_told(change, in_backward):
    (p,) = parameters((4,))
    optimizer = RootFreeRMSprop([p], batch_size=8)
    if in_backward:
        optimizer.accumulate_in_backward()
        p.sum().backward()
    else:
        take(optimizer, [p], [[torch.ones(4)]])
    CHANGES[change](optimizer, p)
    if in_backward:
        call = p.sum().backward
    else:
        p.sum().backward()
        call = optimizer.accumulate
    with pytest.raises(ValueError, match="changed since the last accumulate"):
        call()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_ranks_sum_is_told(change):
    (p,) = parameters((4,))
    optimizer = RootFreeRMSprop([p], batch_size=8)
    take(optimizer, [p], [[torch.ones(4)]])
    CHANGES[change](optimizer, p)
    with pytest.raises(ValueError, match="changed since the last accumulate"):
        optimizer.reduce_accumulated()


@every_optimizer
def test_a_step_that_raises_leaves_no_sum_behind(name):
    params, twins = (parameters(*SHAPES) for _ in range(2))
    one, other = build(name, params), build(name, twins)
    for optimizer, tensors in ((one, params), (other, twins)):
        take(optimizer, tensors, gradients(2, F32))
    lr, one.param_groups[0]["lr"] = one.param_groups[0]["lr"], -1.0
    with pytest.raises(ValueError, match="lr is -1"):
        one.step()
    assert all(p.grad is None for p in params)
    one.param_groups[0]["lr"] = lr
    one.step()
    other.step()
    assert_identical(snapshot(one, params), snapshot(other, twins))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("on its way")


def test_half_a_backward_is_told():
    params = parameters((2,), (2,))
    optimizer = RootFreeAdamW(params, batch_size=1)
    optimizer.accumulate_in_backward()

    def backward(fails):
        first = params[0] * 1.0
        ((Fails.apply(first) if fails else first).sum() + params[1].sum()).backward()

    backward(False)
    with pytest.raises(ValueError, match="on its way"):
        backward(True)
    backward(False)
    before = [p.detach().clone() for p in params]
    for call in (optimizer.step, optimizer.accumulated_grads):
        with pytest.raises(RuntimeError, match="has not ended; zero_grad"):
            call()
    assert_identical([p.detach() for p in params], before)
    optimizer.zero_grad()
    backward(False)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_two_optimizers_take_no_gradient_twice():
    (p,) = parameters((2,))
    optimizers = [RootFreeAdamW([p], batch_size=1) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.accumulate_in_backward()
    with pytest.raises(RuntimeError, match="another optimizer's accumulate_in_backward"):
        p.sum().backward()
    assert optimizers[1]._accumulated.count == 0


def test_gradients_that_replace_the_means_have_no_squares():
    (p,) = parameters((2,))
    optimizer = RootFreeAdamW([p], batch_size=1, second_moment="micro")
    take(optimizer, [p], [[torch.ones(2)], [torch.ones(2)]])
    optimizer.accumulated_grads()
    p.grad = torch.ones(2)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="was replaced since accumulated_grads"):
        optimizer.step()
    assert torch.equal(p, before)
