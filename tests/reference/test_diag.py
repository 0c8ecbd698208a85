"""The specification against the released code's trajectories, hand-worked numbers, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.golden import DIAGONAL, TOLERANCE, load

from rootfree_fused import reference


def step_as_released(param, grad, state, t, meta):
    common = {k: meta[k] for k in ("lr", "damping", "weight_decay", "batch_size")}
    if meta["optimizer"] == "root-free AdamW":
        step = torch.tensor(float(t + 1)) if meta["bias_correction"] else None
        beta1, beta2 = meta["betas"]
        reference.adamw_(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step,
            beta1=beta1,
            beta2=beta2,
            maximize=False,
            **common,
        )
    else:
        reference.rmsprop_(
            param,
            grad,
            state["square_avg"],
            state["momentum_buffer"],
            alpha=meta["alpha"],
            momentum=meta["momentum"],
            decoupled=meta["weight_decay_mode"] == "decoupled",
            maximize=False,
            **common,
        )


def test_every_diagonal_case_is_here():
    assert len(DIAGONAL) == 7


@pytest.mark.parametrize("case", DIAGONAL)
def test_golden(case):
    data, meta = load(case)
    keys = (
        {"exp_avg": 0.0, "exp_avg_sq": 1.0}
        if "AdamW" in meta["optimizer"]
        else {"square_avg": 1.0, "momentum_buffer": 0.0}
    )
    for i in range(len(meta["shapes"])):
        param = data[f"param0.{i}"]
        state = {key: torch.full_like(param, value) for key, value in keys.items()}
        compared = []
        for t in range(meta["steps"]):
            step_as_released(param, data[f"grad.{t}.{i}"], state, t, meta)
            compared.append((param.clone(), data[f"param.{t}.{i}"]))
        for key in keys:
            if f"{key}.{i}" in data:
                compared.append((state[key], data[f"{key}.{i}"]))
        assert len(compared) > meta["steps"]
        for ours, theirs in compared:
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error <= TOLERANCE[meta["dtype"]], (case, i)


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def test_rmsprop_by_hand():
    # s = 1 + 1/2 (4 * 3^2 - 1) = 18.5; u = 3 / (18.5 + 1.5) = 0.15; buf = 1/2 * 0.2 + 0.15 = 0.25
    # decoupled: p = 2 - 0.1 * 0.5 * 2 - 0.1 * 0.25 = 1.875
    p, g, s, buf = scalar(2.0), scalar(3.0), scalar(1.0), scalar(0.2)
    settings = {"lr": 0.1, "alpha": 0.5, "damping": 1.5, "weight_decay": 0.5, "momentum": 0.5}
    reference.rmsprop_(p, g, s, buf, **settings, batch_size=4, decoupled=True, maximize=False)
    assert (s.item(), buf.item(), p.item()) == pytest.approx((18.5, 0.25, 1.875), rel=1e-15)
    # momentum mode: u = 0.15 + 0.5 * 2 = 1.15; buf = 0.1 + 1.15 = 1.25; p = 2 - 0.125
    p, s, buf = scalar(2.0), scalar(1.0), scalar(0.2)
    reference.rmsprop_(p, g, s, buf, **settings, batch_size=4, decoupled=False, maximize=False)
    assert (s.item(), buf.item(), p.item()) == pytest.approx((18.5, 1.25, 1.875), rel=1e-15)


def test_adamw_by_hand():
    # p = 2 (1 - 0.1 * 0.5) = 1.9; m = 0.5 * 3 = 1.5; s = 1 + 1/4 (4 * 9 - 1) = 9.75
    # p = 1.9 - 0.1 * 1.5 / (9.75 + 0.25) = 1.885
    p, g, m, s = scalar(2.0), scalar(3.0), scalar(0.0), scalar(1.0)
    settings = {"lr": 0.1, "beta1": 0.5, "beta2": 0.75, "damping": 0.25, "weight_decay": 0.5}
    reference.adamw_(p, g, m, s, None, **settings, batch_size=4, maximize=False)
    assert (m.item(), s.item(), p.item()) == pytest.approx((1.5, 9.75, 1.885), rel=1e-15)
    # bias correction at t = 1: m / 0.5 = 3; s / 0.25 = 39; p = 1.9 - 0.3 / 39.25
    p, m, s = scalar(2.0), scalar(0.0), scalar(1.0)
    reference.adamw_(p, g, m, s, torch.tensor(1.0), **settings, batch_size=4, maximize=False)
    assert p.item() == pytest.approx(1.9 - 0.3 / 39.25, rel=1e-15)


def sign_of(x):
    return x if math.isnan(x) else (x > 0) - (x < 0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("placement", ["ema", "batch", "micro"])
def test_sign_by_hand(placement, maximize):
    numbers = [2.0, -1e-30, 0.0, -0.0, math.inf, math.nan]
    rows = [(p, g, m) for p in (3.0, -0.5) for g in numbers for m in (0.25, -0.5, 0.0)]
    p, g, m = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    # Of three micro-batches the signs' sums are 3, 2, 1, 0, ...
    sums = [float(i % 7 - 3) if math.isfinite(row[1]) else math.nan for i, row in enumerate(rows)]
    parts = torch.tensor(sums, dtype=torch.float64)
    given = {"parts": parts, "part_weight": 1 / 3} if placement == "micro" else {}
    settings = {"lr": 0.1, "beta": 0.75, "weight_decay": 0.5, "maximize": maximize}
    reference.sign_(p, g, m, sign_last=placement == "ema", **settings, **given)
    for i, (old, grad, average) in enumerate(rows):
        up = -1 if maximize else 1
        y = {"ema": up * grad, "batch": up * sign_of(grad), "micro": up * sums[i] / 3}[placement]
        average += 0.25 * (y - average)
        z = sign_of(average) if placement == "ema" else average
        expected = pytest.approx(
            (average, old - 0.1 * 0.5 * old - 0.1 * z), rel=1e-15, abs=1e-16, nan_ok=True
        )
        assert (m[i].item(), p[i].item()) == expected


@pytest.mark.parametrize("terms", [8, 32])
@pytest.mark.parametrize("decoupled", [True, False])
def test_rmsprop_is_the_same_for_a_summed_and_an_averaged_loss(terms, decoupled):
    """A sum over B terms has B times the gradient, and s and the damping have B times the unit."""
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    grads = [torch.randn(50, dtype=torch.float64) / terms for _ in range(10)]

    def run(scale, batch_size):
        p, s, buf = start.clone(), torch.full_like(start, scale), torch.zeros_like(start)
        for g in grads:
            reference.rmsprop_(
                p,
                g * scale,
                s,
                buf,
                lr=0.1,
                alpha=0.9,
                damping=1e-3 * scale,
                weight_decay=0.01,
                momentum=0.9,
                batch_size=batch_size,
                decoupled=decoupled,
                maximize=False,
            )
        return p

    averaged, summed = run(1, terms), run(terms, 1)
    assert (averaged - start).abs().max() > 1e-3
    torch.testing.assert_close(summed, averaged, rtol=1e-12, atol=0)


def test_adamw_is_the_same_for_a_summed_and_an_averaged_loss():
    """m carries the gradient's unit and s its square over B: m / s is free of the scale."""
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    grads = [torch.randn(50, dtype=torch.float64) / 16 for _ in range(10)]

    def run(scale, batch_size):
        p, m, s = start.clone(), torch.zeros_like(start), torch.full_like(start, scale)
        for t, g in enumerate(grads):
            reference.adamw_(
                p,
                g * scale,
                m,
                s,
                torch.tensor(t + 1.0),
                lr=0.1,
                beta1=0.9,
                beta2=0.95,
                damping=1e-3 * scale,
                weight_decay=0.01,
                batch_size=batch_size,
                maximize=False,
            )
        return p

    averaged, summed = run(1, 16), run(16, 1)
    assert (averaged - start).abs().max() > 1e-3
    torch.testing.assert_close(summed, averaged, rtol=1e-12, atol=0)


def test_bias_correction_keeps_its_digits_where_beta_is_near_one():
    """1 - beta^t has no cancellation: at t = 1 it is 1 - beta to the last float64 digit."""
    p, g, m, s = scalar(0.0), scalar(1.0), scalar(0.0), scalar(0.0)
    beta = 1 - 2.0**-30
    reference.adamw_(
        p,
        g,
        m,
        s,
        torch.tensor(1.0),
        lr=1.0,
        beta1=beta,
        beta2=beta,
        damping=0.0,
        weight_decay=0.0,
        batch_size=1,
        maximize=False,
    )
    assert p.item() == pytest.approx(-1.0, rel=1e-14)


def test_low_precision_parameters_are_rounded_once():
    torch.manual_seed(0)
    settings = {"lr": 0.1, "alpha": 0.9, "damping": 1e-3, "weight_decay": 0.1, "momentum": 0.9}
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.randn(1000).to(dtype)
        g = torch.randn(1000).to(dtype)
        exact, s, buf = p.float(), torch.ones(1000), torch.zeros(1000)
        s2, buf2 = s.clone(), buf.clone()
        common = {"batch_size": 4, "decoupled": True, "maximize": False}
        reference.rmsprop_(p, g, s, buf, **settings, **common)
        reference.rmsprop_(exact, g.float(), s2, buf2, **settings, **common)
        assert torch.equal(p, exact.to(dtype))
        assert torch.equal(s, s2)
        assert torch.equal(buf, buf2)
