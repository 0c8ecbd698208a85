"""State that starts at the scale of the first gradient: initial_square_avg."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.optimizers import (
    SCALED,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)
from helpers.truth import start, step_

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, reference
from rootfree_fused.optimizer.starts import _Asked

CLASSES = (RootFreeRMSprop, RootFreeAdamW, IFShampoo)
FLOAT64 = torch.float64


def second_moment(optimizer, param):
    """What is zero until it starts."""
    state = optimizer.state[param]
    return next(state[k] for k in ("square_avg", "exp_avg_sq", "factor_0") if k in state)


def set_all(params, value):
    for p in params:
        p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 5), (7,)])
def test_factors_start_where_their_update_rests(shape, structure):
    """H_n has the trace 0, and the update is G over the mean of B g^2, damped."""
    grad = torch.randn(shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    square = reference.mean_square(grad, 8)
    assert square.item() == pytest.approx(8 * grad.square().mean().item(), rel=1e-14)
    scale = reference.initial_scale(square, 1e-3, len(shape))
    factors = [scale * torch.ones(d, dtype=FLOAT64) for d in shape]
    if structure == "dense":
        factors = [factor.diag() for factor in factors]
    momenta = [torch.zeros_like(factor) for factor in factors]
    update = reference.precondition(grad, factors)
    torch.testing.assert_close(update, grad / (square + 1e-3), rtol=1e-13, atol=0)
    settings = {"factor_lr": 0.1, "factor_momentum": 0.0, "damping": 1e-3, "batch_size": 8}
    reference.update_factors_(grad, factors, momenta, **settings)
    for momentum in momenta:
        trace = momentum.sum() if structure == "diagonal" else momentum.trace()
        assert abs(trace) <= 1e-13 * momentum.norm()


@pytest.mark.parametrize("initial", ["auto", 1.0, 0.02])
@pytest.mark.parametrize("name", SCALED)
def test_steps_are_those_of_the_specification(name, initial, device):
    """From each tensor's own first gradient, which comes later for one of them."""
    params = parameters((5, 3), (4,), (), (2, 3, 2), dtype=FLOAT64, device=device)
    optimizer = (
        build(name, params, initial_square_avg=initial, factor_dtype=FLOAT64)
        if (name.startswith("ifshampoo"))
        else build(name, params, initial_square_avg=initial)
    )
    group = optimizer.param_groups[0]
    truths = [p.detach().cpu().clone() for p in params]
    states = [start(type(optimizer), p, group, FLOAT64) for p in truths]
    if group.get("momentum"):
        for p, state in zip(truths, states, strict=True):
            state["momentum_buffer"] = torch.zeros_like(p)
    for t in range(5):
        set_grads(params, seed=t)
        if not t:
            params[0].grad = None
        optimizer.step()
        for p, truth, state in zip(params, truths, states, strict=True):
            if p.grad is not None:
                step_(type(optimizer), truth, p.grad.cpu(), state, group)
            torch.testing.assert_close(p.detach().cpu(), truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_first_step_does_not_depend_on_how_the_loss_is_scaled(cls, device):
    """A mean over 4,096 terms and their sum take the same steps from the first on."""
    params, twins = (parameters((6, 4), (3,), dtype=FLOAT64, device=device) for _ in range(2))
    averaged = cls(params, damping=1e-12, batch_size=4096)
    summed = cls(twins, damping=1e-12, batch_size=1)
    for t in range(4):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = 4096 * p.grad
        averaged.step()
        summed.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_zero_gradient_starts_nothing(cls, device):
    """It moves nothing and leaves the state as declared; the next gradient starts it."""
    params, twins = (parameters((6, 4), (3,), (), device=device) for _ in range(2))
    optimizer, fresh = (cls(own, weight_decay=0.0, batch_size=8) for own in (params, twins))
    set_all(params, 0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        optimizer.step()
        assert_identical([p.detach() for p in params], before)
        assert not any(second_moment(optimizer, p).any() for p in params)
    run(optimizer, params[:2], 1)
    run(fresh, twins[:2], 1)
    for p, q in zip(params[:2], twins[:2], strict=True):
        assert torch.equal(second_moment(optimizer, p), second_moment(fresh, q))
    assert not second_moment(optimizer, params[2]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_a_first_gradient_that_is_not_finite_spoils_its_own_element_only(cls, value, device):
    (p,) = parameters((6, 4), device=device)
    optimizer = cls([p], batch_size=8)
    set_all([p], 0.5)
    p.grad[2, 3] = value
    optimizer.step()
    assert (~torch.isfinite(p)).sum() == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_that_the_scaler_skips_starts_nothing(cls, device):
    """And the scale is divided out of the start."""
    params, twins = (parameters((6, 4), (3,), device=device) for _ in range(2))
    optimizer = cls(params, batch_size=8, amp_scaling=True)
    plain = cls(twins, batch_size=8)
    set_grads(params, seed=0)
    set_grads(twins, seed=0)
    for p in params:
        p.grad *= 1024
    optimizer.grad_scale = torch.tensor(1024.0, device=device)
    optimizer.found_inf = torch.ones((), device=device)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert_identical([p.detach() for p in params], before)
    assert not any(second_moment(optimizer, p).any() for p in params)
    optimizer.found_inf.zero_()
    optimizer.step()
    plain.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(second_moment(optimizer, p), second_moment(plain, q))


@pytest.mark.parametrize("name", SCALED)
def test_a_checkpoint_from_before_the_first_gradient_has_not_started(name, device):
    """Read, saved and resumed before and after the start, the steps are the same to the bit."""
    params = parameters((6, 4), (3,), device=device)
    optimizer = build(name, params)
    assert not second_moment(optimizer, params[0]).any()
    for first in (0, 1, 2):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = build(name, twins)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        copied, copies = copy.deepcopy((optimizer, params))
        for each, own in ((optimizer, params), (resumed, twins), (copied, copies)):
            run(each, own, 1, first=first)
        assert_identical(snapshot(resumed, twins), snapshot(optimizer, params))
        assert_identical(snapshot(copied, copies), snapshot(optimizer, params))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_that_has_not_started_loads_into_one_that_has(cls, device):
    params, twins = (parameters((6, 4), (3,), device=device) for _ in range(2))
    optimizer, fresh = (cls(own, batch_size=8) for own in (params, twins))
    saved = optimizer.state_dict()
    run(optimizer, params, 3)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    run(optimizer, params, 3, first=3)
    run(fresh, twins, 3, first=3)
    assert_identical(snapshot(optimizer, params), snapshot(fresh, twins))


@pytest.mark.parametrize("cls", CLASSES)
def test_state_that_is_declared_anew_starts_anew(cls, device):
    params = parameters((6, 4), (3,), device=device)
    optimizer = cls(params, batch_size=8)
    run(optimizer, params, 3)
    for p in params:
        optimizer.state.pop(p)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = cls(twins, batch_size=8)
    run(optimizer, params, 2, first=3)
    run(fresh, twins, 2, first=3)
    assert_identical(snapshot(optimizer, params), snapshot(fresh, twins))


def test_a_matrix_that_starts_between_updates_uses_its_new_factors(device):
    """K K^T is cached between updates of the factors; the start is a write to them."""
    params = parameters((6, 4), (6, 4), device=device)
    settings = {"batch_size": 8, "update_interval": 4, "momentum": 0.0, "damping": 1e-3}
    optimizer = IFShampoo(params, lr=1.0, factor_dtype=torch.float32, **settings)
    set_all(params, 0.25)
    params[1].grad.zero_()
    optimizer.step()
    before = params[1].detach().clone()
    params[1].grad.fill_(0.25)
    optimizer.step()
    moved = before - params[1].detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25 / (8 * 0.0625 + 1e-3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_narrow_gradients_is_exact(dtype, device):
    """2^20 squares: a mean in the gradient's dtype would overflow or stand still."""
    (p,) = parameters((1024, 1024), dtype=dtype, device=device)
    p.grad = torch.full_like(p, 16.0)
    optimizer = RootFreeRMSprop([p], lr=0.0, alpha=1.0, batch_size=2)
    optimizer.step()
    assert (optimizer.state[p]["square_avg"] == 512.0).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_start_cannot_change_once_there_is_state(cls):
    params = parameters((6, 4))
    optimizer = cls(params, batch_size=8)
    optimizer.param_groups[0]["initial_square_avg"] = 0.5
    run(optimizer, params, 1)
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["initial_square_avg"] = "auto"
    with pytest.raises(ValueError, match=r"initial_square_avg of group 0 was 0\.5 when its"):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)
    for bad in (0.0, -1.0, float("inf"), "mean"):
        with pytest.raises((TypeError, ValueError), match=r"initial_square_avg is .*'auto'"):
            cls(params, batch_size=8, initial_square_avg=bad)


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_a_compiled_step_starts_as_an_eager_one(cls):
    params, twins = (parameters((6, 4), (3,)) for _ in range(2))
    optimizer, eager = (cls(own, batch_size=8) for own in (params, twins))
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for t in range(3):
        for own in (params, twins):
            set_grads(own, seed=max(t, 1))
            if not t:
                set_all(own, 0.0)
        step()
        eager.step()
        assert_identical(snapshot(optimizer, params), snapshot(eager, twins))


def test_answers_that_a_capture_finds_open_are_left_alone(monkeypatch):
    """CUDA refuses to query an event under capture; the captured step looks at the state itself."""

    class Event:
        def query(self):
            pytest.fail("an event was queried under capture")

    params = parameters((5, 3), (4,))
    optimizer = build("rmsprop", params, capturable=True)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer, params)
    twin = copy.deepcopy((params, optimizer))
    starts = optimizer._starts
    starts._asked.append(_Asked(Event(), torch.tensor([True]), [(params[0], ())]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    starts._drop_started(starts._waiting[0])
    assert len(starts._asked) == 1
    assert_identical(snapshot(optimizer, params), before)
    set_grads(params, 1)
    set_grads(twin[0], 1)
    optimizer.step()
    twin[1].step()
    assert_identical(snapshot(optimizer, params), snapshot(twin[1], twin[0]))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_gradient_whose_square_s_cannot_hold_starts_nothing(cls, device):
    """So what a checkpoint says of it, zero, is what the running optimizer knows."""
    results = []
    for reload in (False, True):
        (p,) = parameters((5,), device=device)
        optimizer = cls([p], batch_size=4)
        set_all([p], 1e-30)
        optimizer.step()
        assert not second_moment(optimizer, p).any()
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        set_all([p], 0.5)
        optimizer.step()
        assert second_moment(optimizer, p).min() > 0.5  # B g^2 is 1
        results.append(snapshot(optimizer, [p]))
    assert_identical(*results)


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_without_damping_the_start_must_be_given(cls):
    params = parameters((3,))
    with pytest.raises(ValueError, match=r"damping is 0 and .*'auto'.*initial_square_avg=1"):
        cls(params, batch_size=4, damping=0.0)
    optimizer = cls(params, batch_size=4, damping=0.0, initial_square_avg=1)
    set_all(params, 0.0)
    optimizer.step()
    assert params[0].isfinite().all()


def test_a_matrix_on_meta_has_state_there():
    p = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = IFShampoo([p], batch_size=4)
    assert optimizer.state_dict()["state"][0]["factor_0"].is_meta
