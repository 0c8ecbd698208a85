"""Sign: its three placements from step to step, on what `accumulate` took, and its settings."""

from __future__ import annotations

import pytest
import torch
from helpers.micro_batches import F32, F64, SHAPES, gradients, mean_of, set_mean, take
from helpers.optimizers import assert_identical, parameters
from torch.amp import GradScaler

from rootfree_fused import Sign

LR, BETA, DECAY = 0.05, 0.8, 0.1
SETTINGS = {"lr": LR, "beta": BETA, "weight_decay": DECAY}


def expected(params, averages, targets, sign_last):
    """The equations, on float64 tensors."""
    for p, m, y in zip(params, averages, targets, strict=True):
        m += (1 - BETA) * (y - m)
        p *= 1 - LR * DECAY
        p -= LR * (m.sign() if sign_last else m)


def wide(tensors):
    return [t.detach().double().clone() for t in tensors]


def close(actual, truths, tolerance=1e-15):
    for a, truth in zip(actual, truths, strict=True):
        torch.testing.assert_close(a.detach(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("sign", ["ema", "batch", "micro"])
def test_without_micro_batches_the_sign_is_that_of_the_average_or_the_gradient(
    sign, maximize, device
):
    params = parameters(*SHAPES, dtype=F64, device=device)
    optimizer = Sign(params, sign=sign, maximize=maximize, **SETTINGS)
    truths, averages = wide(params), [torch.zeros_like(p) for p in wide(params)]
    for t in range(4):
        (grads,) = ([g.to(device) for g in own] for own in gradients(1, seed=t))
        set_mean(params, grads)
        optimizer.step()
        up = [-g if maximize else g for g in grads]
        expected(truths, averages, up if sign == "ema" else [g.sign() for g in up], sign == "ema")
        close(params, truths)
        close([optimizer.state[p]["exp_avg"] for p in params], averages)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("terms", [None, (64, 32, 5)])
@pytest.mark.parametrize("sign", ["ema", "batch", "micro"])
def test_where_the_sign_is_taken_of_micro_batches(sign, terms, maximize, device):
    """Before the mean over them, after it, or after the average over steps."""
    params = parameters(*SHAPES, dtype=F64, device=device)
    optimizer = Sign(params, sign=sign, maximize=maximize, **SETTINGS)
    truths, averages = wide(params), [torch.zeros_like(p) for p in wide(params)]
    for t in range(4):
        grads = [[g.to(device) for g in own] for own in gradients(3, seed=t)]
        take(optimizer, params, grads, terms)
        optimizer.step()
        up = [[-g if maximize else g for g in own] for own in grads]
        signs = [[g.sign() for g in own] for own in up]
        mean = mean_of(up, terms)
        targets = {"ema": mean, "batch": [g.sign() for g in mean], "micro": mean_of(signs, terms)}
        expected(truths, averages, targets[sign], sign == "ema")
        close(params, truths)
        close([optimizer.state[p]["exp_avg"] for p in params], averages)


def test_micro_batches_that_disagree_move_nothing(device):
    (p,) = parameters((3,), dtype=F64, device=device)
    before = p.detach().clone()
    optimizer = Sign([p], sign="micro", lr=0.1)
    for g in ([1.0, -1e-9, 0.0], [-7.0, 1e9, 0.0]):
        p.grad = torch.tensor(g, dtype=F64, device=device)
        optimizer.accumulate()
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("sign", ["ema", "batch", "micro"])
def test_a_gradient_scaler_leaves_no_trace(sign, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    scaled = Sign(params, sign=sign, amp_scaling=True, **SETTINGS)
    plain = Sign(twins, sign=sign, **SETTINGS)
    scaler = GradScaler(device.type, init_scale=2.0**12)
    for t in range(3):
        scaler.scale(torch.zeros((), device=device))
        grads = [[g.to(device) for g in own] for own in gradients(4, F32, seed=t)]
        take(scaled, params, [[g * scaler.get_scale() for g in own] for own in grads])
        scaled.accumulated_grads()
        scaler.step(scaled)
        scaler.update()
        take(plain, twins, grads)
        plain.step()
    moved = [p.detach() for p in params], [p.detach() for p in twins]
    assert_identical(*moved)
    assert not torch.equal(moved[0][0], parameters(*SHAPES, device=device)[0])
    if sign != "ema":
        averages = (
            [o.state[p]["exp_avg"] for p in ps] for o, ps in ((scaled, params), (plain, twins))
        )
        assert_identical(*averages)


@pytest.mark.parametrize("sign", ["ema", "batch", "micro"])
def test_in_fewer_bytes_it_stays_near(sign, device):
    shape = [(64, 128)]
    params = parameters(*shape, dtype=torch.bfloat16, device=device)
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    start = twins[0].detach().clone()
    narrow = Sign(params, sign=sign, param_residual=8, state_format="8bit", **SETTINGS)
    other = Sign(twins, sign=sign, **SETTINGS)
    for t in range(3):
        grads = [[g.to(device) for g in own] for own in gradients(4, torch.bfloat16, t, shape)]
        take(narrow, params, grads)
        narrow.step()
        take(other, twins, [[g.float() for g in own] for own in grads])
        other.step()
    assert narrow.state[params[0]]["exp_avg"].dtype == torch.int8
    assert (params[0].float() - twins[0]).norm() < 0.1 * (twins[0] - start).norm()


def test_its_step_is_that_of_signum_and_bounded_by_lr():
    """beta = 0 and "ema" are signSGD; a step of either placement is at most lr an element."""
    (p,), (q,) = (parameters((50,), dtype=F64) for _ in range(2))
    set_mean([p], gradients(1, shapes=[(50,)])[0])
    before = p.detach().clone()
    Sign([p], lr=0.01, beta=0.0).step()
    assert torch.equal(p, before - 0.01 * p.grad.sign())
    average = Sign([q], lr=0.01, sign="batch")
    for t in range(30):
        old = q.detach().clone()
        set_mean([q], gradients(1, seed=t, shapes=[(50,)])[0])
        average.step()
        assert (q - old).abs().max() <= 0.01 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sign": "mean"}, "sign is 'mean'; pass 'ema' or 'batch' or 'micro'"),
        ({"sign": True}, "sign is True"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ],
    ids=str,
)
def test_settings_out_of_their_range(settings, words):
    params = parameters((3,))
    with pytest.raises(ValueError, match=words):
        Sign(params, **settings)
    optimizer = Sign(params)
    optimizer.param_groups[0].update(settings)
    set_mean(params, [torch.ones(3)])
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    ("setting", "cure"),
    [
        ("alpha", "pass beta="),
        ("betas", "pass beta="),
        ("momentum", "pass beta="),
        ("eps", "leave it out: nothing divides"),
        ("damping", "leave it out: nothing divides"),
        ("batch_size", "leave it out: nothing divides"),
        ("initial_square_avg", "leave it out: nothing divides"),
        ("second_moment", "it has lr, beta, "),
    ],
)
def test_what_other_optimizers_have_is_answered(setting, cure):
    with pytest.raises(TypeError, match=f"Sign has no argument '{setting}'; {cure}"):
        Sign(parameters((3,)), **{setting: 0.5})
