"""Clipping, and gradient scalers, of gradients that were accumulated."""

from __future__ import annotations

import pytest
import torch
from helpers.micro_batches import F32, F64, SHAPES, gradients, mean_of, set_mean, take
from helpers.optimizers import DIAGONAL, SETTINGS, assert_identical, build, parameters, snapshot
from torch.amp import GradScaler

from rootfree_fused import RootFreeRMSprop

BF16 = torch.bfloat16
SQUARED = [name for name in DIAGONAL if name.startswith(("rmsprop", "adamw"))]
every_optimizer = pytest.mark.parametrize("name", SETTINGS)


# Clipping and scalers -------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_what_is_clipped_is_stepped(name, dtype):
    params, twins = (parameters(*SHAPES, dtype=dtype) for _ in range(2))
    one, whole = build(name, params), build(name, twins)
    for t in range(3):
        grads = gradients(2, dtype, seed=t)
        take(one, params, grads)
        means = one.accumulated_grads()
        assert all(m is p.grad for m, p in zip(means, params, strict=True))
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        with pytest.raises(RuntimeError, match="has ended this accumulation"):
            one.accumulate()
        one.step()
        assert all(p.grad is None for p in params)
        set_mean(twins, mean_of(grads))
        torch.nn.utils.clip_grad_norm_(twins, 0.1)
        whole.step()
    assert_identical(snapshot(one, params), snapshot(whole, twins))


def scaled(scaler, grads):
    scaler.scale(torch.zeros(()))
    return [[g * scaler.get_scale() for g in own] for own in grads]


@every_optimizer
@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_scaler_leaves_no_trace(name, in_kernel):
    params, twins = (parameters(*SHAPES) for _ in range(2))
    one, plain = build(name, params, amp_scaling=in_kernel), build(name, twins)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    for t in range(3):
        grads = gradients(4, F32, seed=t)
        take(one, params, scaled(scaler, grads))
        one.accumulated_grads()
        scaler.step(one)
        scaler.update()
        take(plain, twins, grads)
        plain.step()
    for a, b in zip(snapshot(one, params), snapshot(plain, twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SQUARED)
@pytest.mark.parametrize("kind", ["micro", "variance", "mean"])
def test_squares_are_unscaled_in_the_kernel(name, kind):
    params, twins = (parameters(*SHAPES) for _ in range(2))
    one = build(name, params, amp_scaling=True, second_moment=kind)
    plain = build(name, twins, second_moment=kind)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    for t in range(3):
        grads = gradients(4, F32, seed=t)
        take(one, params, scaled(scaler, grads))
        one.accumulated_grads()
        scaler.step(one)
        scaler.update()
        take(plain, twins, grads)
        plain.accumulated_grads()
        plain.step()
    assert_identical(
        [t.to("cpu") for t in snapshot(one, params)], [t.to("cpu") for t in snapshot(plain, twins)]
    )


KINDS = [(n, {"second_moment": k}) for n in SQUARED for k in ("micro", "variance", "mean")]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("sign", {"sign": "micro"})])
def test_means_are_stepped_as_sums_are(name, kind):
    """Four micro-batches: dividing by 4 and 16 rounds nothing."""
    params, twins = (parameters(*SHAPES) for _ in range(2))
    one, other = build(name, params, **kind), build(name, twins, **kind)
    for t in range(3):
        for optimizer, tensors in ((one, params), (other, twins)):
            take(optimizer, tensors, gradients(4, F32, seed=t))
        one.accumulated_grads()
        one.step()
        other.step()
    assert_identical(snapshot(one, params), snapshot(other, twins))


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("shampoo", {})])
def test_a_scale_that_is_given_by_hand_is_divided_out_of_sums(name, kind):
    """As a scaler leaves it, for who writes one that looks for infs in backwards."""
    params, twins = (parameters(*SHAPES) for _ in range(2))
    one, plain = build(name, params, amp_scaling=True, **kind), build(name, twins, **kind)
    one.grad_scale, one.found_inf = torch.tensor(2.0**12), torch.tensor(0.0)
    for t in range(3):
        grads = gradients(4, F32, seed=t)
        take(one, params, [[g * 2.0**12 for g in own] for own in grads])
        take(plain, twins, grads)
        one.step()
        plain.step()
    assert_identical(
        [t.to("cpu") for t in snapshot(one, params)], [t.to("cpu") for t in snapshot(plain, twins)]
    )


@every_optimizer
@pytest.mark.parametrize("in_kernel", [True, False])
def test_an_inf_in_one_micro_batch_skips_the_step(name, in_kernel):
    params = parameters(*SHAPES)
    optimizer = build(name, params, amp_scaling=in_kernel)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    take(optimizer, params, scaled(scaler, gradients(3, F32)))
    optimizer.accumulated_grads()
    scaler.step(optimizer)
    scaler.update()
    before = snapshot(optimizer, params)
    grads = scaled(scaler, gradients(3, F32, seed=1))
    grads[1][0][2, 3] = torch.inf
    take(optimizer, params, grads)
    optimizer.accumulated_grads()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert_identical(snapshot(optimizer, params), before)
    assert scaler.get_scale() == 2.0**11
    take(optimizer, params, scaled(scaler, gradients(3, F32, seed=2)))
    optimizer.accumulated_grads()
    scaler.step(optimizer)
    assert all(bool(p.isfinite().all()) for p in params)
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_scaler_that_would_look_at_nothing_is_told(in_kernel):
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8, amp_scaling=in_kernel)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    take(optimizer, params, scaled(scaler, gradients(2, F32)))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"call optimizer.accumulated_grads\(\) before scaler"):
        scaler.step(optimizer)
    assert_identical([p.detach() for p in params], before)


def test_scaled_squares_need_amp_scaling():
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8, second_moment="micro")
    scaler = GradScaler("cpu", init_scale=2.0**12)
    take(optimizer, params, scaled(scaler, gradients(2, F32)))
    optimizer.accumulated_grads()
    with pytest.raises(ValueError, match="cannot be unscaled later; pass amp_scaling"):
        scaler.step(optimizer)


def test_squares_do_not_go_with_unscale():
    params = parameters(*SHAPES)
    optimizer = RootFreeRMSprop(params, batch_size=8, second_moment="micro", amp_scaling=True)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    take(optimizer, params, scaled(scaler, gradients(2, F32)))
    optimizer.accumulated_grads()
    scaler.unscale_(optimizer)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"scaler.unscale_\(optimizer\) was called where squares"):
        scaler.step(optimizer)
    assert_identical([p.detach() for p in params], before)
