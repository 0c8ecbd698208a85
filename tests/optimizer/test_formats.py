"""Weights and state in fewer bytes, through the optimizers: what is kept and refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.optimizer_formats import (
    BF16,
    CLASSES,
    EVERY,
    F32,
    FIRST,
    MATRICES,
    RESIDUALS,
    SECOND,
    STATES,
    average,
    bits,
    equal,
    optimizer_of,
    parameters,
    run,
    saved,
)

from rootfree_fused.optimizer.unpacked import _Packed
from rootfree_fused.reference.formats import BLOCK, join_weight


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_resumes_has_the_bits_of_one_that_goes_on(name, residual, state):
    params, others = parameters(), parameters(seed=1)
    optimizer = optimizer_of(name, params, residual, state)
    twin = optimizer_of(name, others, residual, state, rounding_seed=5)
    run(optimizer, params, 3)
    checkpoint = saved(optimizer)
    with torch.no_grad():
        for param, other in zip(params, others, strict=True):
            other.copy_(param)
    twin.load_state_dict(checkpoint)
    for one, own in ((optimizer, params), (twin, others)):
        run(one, own, 3, first=3)
    assert equal(bits(optimizer, params), bits(twin, others))


@pytest.mark.parametrize(("residual", "state"), list(itertools.product(RESIDUALS, STATES)))
def test_memory_and_checkpoints_have_the_bytes_of_the_formats(residual, state):
    params = parameters(((256, 512),))
    optimizer = optimizer_of("adamw", params, residual, state)
    run(optimizer, params, 1)
    own = optimizer.state[params[0]]
    kept = sum(v.nbytes for k, v in own.items() if k != "step")
    of_state = {"float32": 8, "bfloat16": 4, "8bit": 2 + 5 / BLOCK}[state]
    of_residual = {8: 1, 16: 2}.get(residual, 0)
    assert kept == params[0].numel() * (of_state + of_residual)
    (checkpoint,) = optimizer.state_dict()["state"].values()
    assert sum(v.nbytes for k, v in checkpoint.items() if k != "step") == kept
    assert torch.int16 not in {v.dtype for v in checkpoint.values()}


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_vectors_and_small_tensors_keep_float32(state):
    params = parameters(((63, 65), (64, 64), (5000,), ()))
    optimizer = optimizer_of("adamw", params, 8, state)
    run(optimizer, params, 1)
    dtypes = [optimizer.state[p]["exp_avg_sq"].dtype for p in params]
    assert dtypes == [F32, {"bfloat16": BF16, "8bit": torch.uint8}[state], F32, F32]
    assert all(optimizer.state[p]["param_residual"].dtype == torch.int8 for p in params)


@pytest.mark.parametrize("name", CLASSES)
def test_a_residual_of_16_bits_trains_as_float32_weights_do(name):
    params, others = parameters(), parameters()
    others = [torch.nn.Parameter(p.detach().float()) for p in others]
    optimizer, twin = optimizer_of(name, params, 16), optimizer_of(name, others)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).to(BF16)
            other.grad = param.grad.float()
        optimizer.step()
        twin.step()
    for param, other in zip(params, others, strict=True):
        joined = join_weight(param, optimizer.state[param]["param_residual"])
        torch.testing.assert_close(joined, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(param.float(), other)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("factor_dtype", [F32, BF16])
def test_matrices_with_a_residual_of_16_bits_train_as_float32_does(name, factor_dtype):
    params = parameters()
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = optimizer_of(name, params, 16, factor_dtype=factor_dtype)
    twin = optimizer_of(name, others, factor_dtype=factor_dtype)
    for _ in range(3):
        run(optimizer, params, 1)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.float()
        twin.step()
    for param, other in zip(params, others, strict=True):
        if param.dim() == 2:
            own, their = optimizer.state[param], twin.state[other]
            assert torch.equal(join_weight(param.detach(), own["param_residual"]), other)
            assert all(torch.equal(own[key], value) for key, value in their.items())


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_in_float32_for_the_time_of_a_step_alone(name, monkeypatch):
    sizes = []
    original = _Packed.write_

    def write_(packed, scaling):
        sizes.append([value.untyped_storage().nbytes() for value in packed._values])
        original(packed, scaling)
        sizes.append([value.untyped_storage().nbytes() for value in packed._values])

    monkeypatch.setattr(_Packed, "write_", write_)
    params = parameters(((64, 256), (64, 256)))
    run(optimizer_of(name, params, 8, "8bit"), params, 2)
    assert sizes == [[4 * 64 * 256] * 2, [0] * 2] * 4


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CLASSES)
def test_second_moments_come_down_from_1(name, state):
    """Beside entries that stay at 1, whose block they share: to nearest they would freeze."""
    (param,) = params = parameters(((64, 64),), F32)
    decay = {"adamw": {"betas": (0.9, 0.99)}, "rmsprop": {"alpha": 0.99}}[name]
    optimizer = optimizer_of(name, params, None, state, initial_square_avg=1.0, lr=1e-4, **decay)
    small = torch.zeros(64, 64, dtype=torch.bool)
    small[:, ::2] = True
    param.grad = torch.where(small, 1e-2, 1.0)
    for _ in range(1100):
        optimizer.step()
    s = average(optimizer.state[param], SECOND[name])
    expected = 1e-4 + 0.99**1100
    assert s[small].mean() == pytest.approx(expected, rel=0.05)
    assert s[~small].mean() == pytest.approx(1, rel=0.05)
    # The step that such an s gives is on the mean that of s itself, and not far from it.
    step = expected / s[small]
    assert step.mean() == pytest.approx(1, rel=0.1)
    assert step.std() < 0.3


@pytest.mark.parametrize("residual", RESIDUALS)
def test_weights_move_by_less_than_a_step_of_bfloat16(residual):
    (param,) = params = [torch.nn.Parameter(torch.ones(64, 64, dtype=BF16))]
    settings = {"alpha": 1.0, "momentum": 0.0, "damping": 0.0, "initial_square_avg": 1.0}
    optimizer = optimizer_of("rmsprop", params, residual, lr=2.0**-12, **settings)
    param.grad = torch.ones(64, 64, dtype=BF16)
    for _ in range(64):
        optimizer.step()
    moved = 1 - param.float().mean().item()
    # 64 steps of 2^-12; each is 1/16 of what bfloat16 has below 1, where to nearest all are lost.
    assert moved == (0 if residual is None else pytest.approx(2.0**-6, rel=0.1))


@pytest.mark.parametrize(("residual", "state"), list(itertools.product(RESIDUALS, STATES[1:])))
@pytest.mark.parametrize("name", ["adamw", *MATRICES])
def test_a_skipped_step_leaves_every_bit(name, residual, state):
    params = parameters()
    optimizer = optimizer_of(name, params, residual, state, amp_scaling=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    run(optimizer, params, 2)
    before = bits(optimizer, params)
    optimizer.found_inf = torch.tensor(1.0)
    run(optimizer, params, 1, first=2)
    assert equal(bits(optimizer, params), before)
    optimizer.found_inf = torch.tensor(0.0)
    run(optimizer, params, 1, first=2)
    assert not equal(bits(optimizer, params), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_not_finite_stays_in_its_block(name, value):
    params = parameters()
    optimizer = optimizer_of(name, params, 8, "8bit")
    run(optimizer, params, 1)
    params[0].grad[1, 7] = value
    optimizer.step()
    run(optimizer, params, 1, first=1)
    for param in params[1:]:
        assert param.isfinite().all()
        assert all(v.float().isfinite().all() for v in optimizer.state[param].values())
    hurt = torch.zeros(64, 256, dtype=torch.bool)
    hurt[1] = True
    for what in (params[0], average(optimizer.state[params[0]], FIRST[name])):
        assert what[~hurt].isfinite().all()
        assert not what[1, 7].isfinite()
    with pytest.raises(ValueError, match="holds nan"):
        optimizer_of(name, parameters(), 8, "8bit").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_state_of_8_bits_starts_at_the_first_gradient(name):
    (param,) = params = parameters(((64, 101),))
    optimizer = optimizer_of(name, params, 8, "8bit")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert not average(optimizer.state[param], SECOND[name]).any()
    param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    s = average(optimizer.state[param], SECOND[name])
    torch.testing.assert_close(s, torch.full_like(s, 0.0625))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "dtype", "settings"),
    [
        (TypeError, "is torch.float32 but param_residual.*to_bfloat16_", F32, {"residual": 8}),
        (TypeError, "is torch.float16 but", torch.float16, {"residual": "stochastic"}),
        (TypeError, "is float64 but state_format", torch.float64, {"state": "8bit"}),
        (ValueError, "param_residual is 4; pass None or", BF16, {"residual": 4}),
        (ValueError, "state_format is '4bit'; pass", BF16, {"state": "4bit"}),
        (TypeError, "rounding_seed is 0.5", BF16, {"rounding_seed": 0.5}),
    ],
)
def test_settings_that_do_not_fit_are_refused(error, words, dtype, settings):
    with pytest.raises(error, match=words):
        optimizer_of("adamw", parameters(dtype=dtype), **settings)


@pytest.mark.parametrize(
    ("name", "value"), [("param_residual", 16), ("state_format", "8bit"), ("rounding_seed", 1)]
)
def test_formats_do_not_change_between_steps(name, value):
    params = parameters()
    optimizer = optimizer_of("adamw", params, 8, "bfloat16")
    run(optimizer, params, 1)
    before = bits(optimizer, params)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} of group 0 was"):
        run(optimizer, params, 1)
    assert equal(bits(optimizer, params), before)


@pytest.mark.parametrize("name", MATRICES)
def test_what_formats_do_not_go_together_with_is_refused(name):
    joined = torch.nn.Linear(64, 101).bfloat16().named_parameters()
    with pytest.raises(ValueError, match="combine is 'module'"):
        optimizer_of(name, joined, 8, combine="module")
    if name == "shampoo":
        settings = {"vector_method": "rootfree", "batch_axes": 1}
        with pytest.raises(ValueError, match="pass vector_method='adam'"):
            optimizer_of(name, parameters(((2, 64, 64),)), 8, **settings)
