"""Numbers at the edge: gradients of any finite size, of zero, from one corrupt sample."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_bits_equal
from helpers.cpu_matrix import BF16, DENSE, DIAGONAL, F32, F64, Problem
from helpers.optimizers import SETTINGS, build
from torch import nn

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, ops, reference

needs_extension = pytest.mark.skipif(
    ops.backends()["cpu"].startswith("reference"), reason="no extension"
)
DTYPES = pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)


# Large gradients


@pytest.mark.parametrize("size", [1e9, 1e12, 1e18, 1e19, 1e28, 1e37])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_finite_gradients_never_make_nan(name, dtype, size, device):
    shapes = [(9, 8), (5,)]
    params = [nn.Parameter(torch.zeros(s, dtype=dtype, device=device)) for s in shapes]
    optimizer = build(name, params, lr=1e-30, batch_size=256)
    if dtype is F64:
        size = min(size**5, 1e180)  # B g^2 overflows float64 too
    for _ in range(8):
        for p in params:
            p.grad = torch.randn_like(p) * size
        optimizer.step()
    for p in params:
        for key, value in {"parameter": p, **optimizer.state[p]}.items():
            assert value.isfinite().all(), key
        for key in optimizer.state[p].keys() & {"factor_0", "factor_1"}:
            factor = optimizer.state[p][key]
            start = torch.eye(len(factor)) if factor.dim() == 2 else torch.ones(len(factor))
            assert not torch.equal(factor.cpu(), start.to(factor.dtype)), f"{key} never moved"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW, IFShampoo])
def test_other_gradients_are_not_hidden(cls, bad):
    param = nn.Parameter(torch.ones(8, 8))
    optimizer = cls([param], batch_size=8)
    param.grad = torch.ones(8, 8)
    param.grad[3, 3] = bad
    optimizer.step()
    assert not param[3, 3].isfinite()


@needs_extension
@pytest.mark.usefixtures("isa")
@DTYPES
def test_entries_beyond_the_limit_count_as_the_limit(dtype):
    """Bit for bit, in gradients of the parameter's dtype and in float32."""
    for grad in (F32, BF16):
        problems = [Problem([((70, 33), DENSE, 2, DENSE)], dtype, grad=grad) for _ in range(2)]
        one, other = problems
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            b.copy_(a)
        for i, gradient in enumerate(one.grads):
            gradient.mul_(1e13)
            limit = reference.matrix.LARGEST_GRADIENT
            other.grads[i].copy_(gradient.clamp(-limit, limit))
            assert not torch.equal(gradient, other.grads[i])
        for problem in problems:
            problem.run()
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            assert_bits_equal(a, b)
            assert a.isfinite().all()


# The bound of a step


@needs_extension
@pytest.mark.usefixtures("isa")
@DTYPES
@pytest.mark.parametrize("dense", [DENSE, DIAGONAL], ids=str)
def test_the_bound_is_the_specifications(dtype, dense):
    problem = Problem([((70, 33), dense, 2, dense)], dtype, bound=0.2)
    problem.check(updates=(True, False))


@needs_extension
@pytest.mark.usefixtures("isa")
@DTYPES
def test_a_bound_that_nothing_reaches_changes_no_bit(dtype):
    results = []
    for bound in (None, 1e3):
        torch.manual_seed(0)
        problem = Problem([((70, 33), DENSE, 2, DENSE)], dtype, bound=bound)
        problem.run()
        results.append(problem.tensors())
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


def train(outlier=1.0, steps=400, at=250, **settings):
    """Losses and weights of an MLP; at one step one of its targets is `outlier` times as large."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    layers = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    model = nn.Sequential(*layers)
    optimizer = IFShampoo(model.parameters(), batch_size=64, **settings)
    x = torch.rand(1024, 16, generator=generator)
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    losses = []
    for step in range(steps):
        chosen = torch.randint(0, 1024, (64,), generator=generator)
        target = y[chosen].clone()
        if step == at:
            target[0] *= outlier
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[chosen]), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, list(model.parameters())


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("outlier", [1e4, 1e6])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_outlier_is_survived(dtype, outlier, interval):
    """At 249 the factors are updated or not; without a bound every case ends in NaN."""
    settings = {"factor_dtype": dtype, "update_interval": interval}
    losses, _ = train(outlier, at=249, lr=1e-3, **settings)
    assert sum(losses[-20:]) / 20 < 2 * sum(losses[239:249]) / 10


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_outlier_is_survived_at_the_defaults(dtype):
    losses, _ = train(1e4, at=249, factor_dtype=dtype)
    assert sum(losses[-20:]) / 20 < 2 * sum(losses[239:249]) / 10


def test_the_bound_never_acts_in_a_healthy_training():
    (_, bounded), (_, free) = train(steps=200), train(steps=200, max_update=None)
    for a, b in zip(bounded, free, strict=True):
        assert torch.equal(a, b)


# Gradients of zero


@needs_extension
@pytest.mark.usefixtures("isa", "two_threads")
@DTYPES
@pytest.mark.parametrize("dense", [DENSE, DIAGONAL], ids=str)
@pytest.mark.parametrize("cached", [DENSE, DIAGONAL], ids=["cached", "sequential"])
def test_a_zero_gradient_leaves_factors_alone_and_its_neighbours_move(dtype, dense, cached):
    problem = Problem([((70, 33), dense, 3, cached)], dtype)
    problem.grads[1].zero_()
    before = [t.clone() for t in (*problem.factors, *problem.residuals, *problem.momenta)]
    problem.check(updates=(True, True))
    after = [*problem.factors, *problem.residuals, *problem.momenta]
    for old, new in zip(before, after, strict=True):
        if new.numel():
            assert torch.equal(old[1], new[1])
            assert not torch.equal(old[0], new[0])
            assert not torch.equal(old[2], new[2])
    for factor, product in zip(problem.factors, problem.products, strict=True):
        if product.numel():
            own = factor[1].double()
            torch.testing.assert_close(product[1].double(), own @ own.T, rtol=1e-2, atol=1e-2)


def test_a_denormal_gradient_is_not_zero():
    """Its square is: the specification asks for a gradient that is exactly zero."""
    for dtype in (F32, BF16):
        param = nn.Parameter(torch.zeros(8, 8))
        optimizer = IFShampoo([param], batch_size=8, factor_dtype=dtype)
        param.grad = torch.full((8, 8), 1e-40)
        optimizer.step()
        assert not torch.equal(optimizer.state[param]["factor_0"], torch.eye(8).to(dtype))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("ifshampoo")])
def test_factors_do_not_grow_while_there_is_no_gradient(name, device):
    """Without the rule they pass 1 / damping after 50 steps."""
    params = [nn.Parameter(torch.ones(s, device=device)) for s in ((16, 24), (7,), (2, 3, 4))]
    optimizer = build(name, params)
    for gradient in (1.0, 0.0):
        kept = {
            (i, key): value.clone()
            for i, p in enumerate(params)
            for key, value in optimizer.state[p].items()
        }
        for _ in range(30 if gradient == 0 else 4):
            for p in params:
                p.grad = gradient * torch.randn_like(p)
            optimizer.step()
    for (i, key), value in kept.items():
        if key.startswith("factor"):
            assert torch.equal(value, optimizer.state[params[i]][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_of_the_largest_gradients_stay_finite(dtype, device):
    """Where signs alternate, g - m is the largest number of all."""
    largest = torch.finfo(dtype).max
    p = torch.nn.Parameter(torch.zeros(19, dtype=dtype, device=device))
    optimizer = RootFreeAdamW([p], batch_size=4)
    for t in range(12):
        p.grad = torch.full_like(p, largest if t % 3 else -largest)
        optimizer.step()
        assert p.isfinite().all()
        assert optimizer.state[p]["exp_avg"].isfinite().all()
