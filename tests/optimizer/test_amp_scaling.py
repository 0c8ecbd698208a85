"""torch.amp.GradScaler, by its own path and by the kernels', for every optimizer and device."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.optimizers import (
    SETTINGS,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)
from torch.amp import GradScaler

from rootfree_fused import IFShampoo, ops

SHAPES = [(7, 5), (11,), (), (3, 4, 2)]
SCALE = 2.0**12
every_optimizer = pytest.mark.parametrize("name", SETTINGS)
both_paths = pytest.mark.parametrize("in_kernel", [False, True], ids=["external", "in-kernel"])


def scaled_step(scaler, optimizer, params, seed, infs=False):
    """As after the backward of a scaled loss."""
    scaler.scale(torch.zeros((), device=params[0].device))
    set_grads(params, seed)
    for p in params:
        p.grad.mul_(scaler.get_scale())
    if infs:
        params[0].grad.view(-1)[0] = math.inf
    scaler.step(optimizer)
    scaler.update()


@every_optimizer
@both_paths
def test_scaled_training_is_training(name, in_kernel, device):
    """To the bit, since the scale is a power of two; the kernel writes no gradient."""
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    scaled, plain = build(name, params, amp_scaling=in_kernel), build(name, twins)
    scaler = GradScaler(device.type, init_scale=SCALE)
    for t in range(5):
        scaled_step(scaler, scaled, params, seed=100 + t)
        kept = [p.grad / (SCALE if in_kernel else 1) for p in params]
        run(plain, twins, 1, first=t)
        assert_identical(kept, [p.grad for p in twins])
    kept = [t.to("cpu") for t in snapshot(scaled, params)]
    assert_identical(kept, [t.to("cpu") for t in snapshot(plain, twins)])


@every_optimizer
@both_paths
def test_a_step_with_infs_leaves_every_bit(name, in_kernel, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params, amp_scaling=in_kernel)
    scaler = GradScaler(device.type, init_scale=SCALE)
    scaled_step(scaler, optimizer, params, seed=1)
    before = snapshot(optimizer, params)
    scaled_step(scaler, optimizer, params, seed=2, infs=True)
    assert_identical(snapshot(optimizer, params), before)
    assert scaler.get_scale() == SCALE / 2
    scaled_step(scaler, optimizer, params, seed=3)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=False))


@every_optimizer
def test_clipping_after_unscale(name, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    scaled, plain = build(name, params, amp_scaling=True), build(name, twins)
    scaler = GradScaler(device.type, init_scale=SCALE)
    scaler.scale(torch.zeros((), device=device))
    for ps in (params, twins):
        set_grads(ps, seed=1)
    for p in params:
        p.grad.mul_(SCALE)
    scaler.unscale_(scaled)
    for ps in (params, twins):
        torch.nn.utils.clip_grad_norm_(ps, 0.01)
    scaler.step(scaled)
    plain.step()
    assert_identical([p.detach() for p in params], [p.detach() for p in twins])


@every_optimizer
def test_float16_gradients_keep_what_float16_would_lose(name, device):
    """1.5 * 2^-24 is no float16 number; scaled it is one. The plain step has it in float32."""
    params, twins = (parameters(*SHAPES, dtype=torch.float16, device=device) for _ in range(2))
    scaled, plain = build(name, params, amp_scaling=True), build(name, twins)
    scaler = GradScaler(device.type, init_scale=2.0**16)
    scaler.scale(torch.zeros((), device=device))
    for p, twin in zip(params, twins, strict=True):
        p.grad = torch.full_like(p, 1.5 * 2.0**-8)
        twin.grad_dtype = torch.float32
        twin.grad = torch.full_like(twin, 1.5 * 2.0**-24, dtype=torch.float32)
    scaler.step(scaled)
    plain.step()
    kept = [t.to("cpu") for t in snapshot(scaled, params)]
    assert_identical(kept, [t.to("cpu") for t in snapshot(plain, twins)])


@both_paths
def test_factors_are_updated_every_other_step_that_is_taken(in_kernel, device):
    params = parameters((6, 4), device=device)
    optimizer = IFShampoo(
        params, batch_size=8, update_interval=2, amp_scaling=in_kernel, factor_dtype=torch.float32
    )
    scaler = GradScaler(device.type, init_scale=SCALE)
    updated = []
    for t, infs in enumerate([False, True, False, True, True, False, False]):
        before = optimizer.state[params[0]]["factor_0"].clone()
        scaled_step(scaler, optimizer, params, seed=t, infs=infs)
        updated.append(not torch.equal(optimizer.state[params[0]]["factor_0"], before))
    assert updated == [True, False, False, False, False, True, False]
    assert optimizer.state[params[0]]["step"] == 4


@both_paths
def test_infs_in_the_first_step_after_a_load_leave_no_stale_product(in_kernel, device):
    """K K^T is made anew in the next step that is taken, which here updates no factors."""
    params, twins = (parameters((6, 4), device=device) for _ in range(2))
    pairs = []
    for ps in (params, twins):
        settings = {"update_interval": 3, "factor_dtype": torch.float32}
        saved, loaded = (
            IFShampoo(ps, batch_size=8, amp_scaling=in_kernel, **settings) for _ in range(2)
        )
        run(saved, ps, 2)
        loaded.load_state_dict(saved.state_dict())
        pairs.append((loaded, ps, GradScaler(device.type, init_scale=SCALE)))
    (first, _, scaler), _ = pairs
    scaled_step(scaler, first, params, seed=1, infs=True)
    for optimizer, ps, own in pairs:
        scaled_step(own, optimizer, ps, seed=2)
    assert_identical(snapshot(first, params), snapshot(pairs[1][0], twins))


def test_the_kernel_path_is_opt_in():
    (p,) = parameters((3,))
    assert not build("adamw", [p])._step_supports_amp_scaling
    optimizer = build("adamw", [p], amp_scaling=True)
    assert optimizer._step_supports_amp_scaling
    assert optimizer.param_groups[0]["amp_scaling"] is True
    with pytest.raises(ValueError, match="amp_scaling is 1; pass False or True"):
        build("adamw", [p], amp_scaling=1)


@pytest.mark.parametrize(
    ("scaling", "error", "words"),
    [
        ({"grad_scale": 2.0}, TypeError, "grad_scale is 2.0, a float; pass a tensor or None"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf is .*\(2,\).*pass one float32"),
        ({"found_inf": torch.zeros(1).bool()}, ValueError, "found_inf is a torch.bool tensor"),
    ],
)
def test_functions_check_what_a_scaler_left(scaling, error, words):
    p, g, s = torch.ones(3), torch.ones(3), torch.ones(3)
    with pytest.raises(error, match=words):
        ops.rmsprop_([p], [g], [s], lr=0.1, batch_size=1, **scaling)
    with pytest.raises(error, match=words):
        ops.adamw_([p], [g], [torch.zeros(3)], [s], lr=0.1, batch_size=1, **scaling)
    assert torch.equal(p, torch.ones(3))
    assert torch.equal(s, torch.ones(3))
