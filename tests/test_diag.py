"""RootFreeRMSprop and RootFreeAdamW: their mathematics, and where they equal torch.optim."""

from __future__ import annotations

import pytest
import torch
from helpers.golden import DIAGONAL as TRAJECTORIES
from helpers.golden import TOLERANCE, diagonal_optimizer, load
from helpers.optimizers import DIAGONAL, SCALED, build, parameters, run, set_grads

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop

FLOAT64 = torch.float64


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_golden(case, device):
    """The released code's trajectories, by the optimizers and so by this device's kernels."""
    data, meta = load(case)
    indices = range(len(meta["shapes"]))
    params = [torch.nn.Parameter(data[f"param0.{i}"].to(device)) for i in indices]
    optimizer = diagonal_optimizer(params, meta)
    for t in range(meta["steps"]):
        for i, p in enumerate(params):
            p.grad = data[f"grad.{t}.{i}"].to(device)
        optimizer.step()
        for i, p in enumerate(params):
            expected = data[f"param.{t}.{i}"]
            error = (p.detach().cpu() - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE[meta["dtype"]]


def close(params, twins, rtol=1e-12):
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=0)


def pair(*shapes, device):
    return (parameters(*shapes, dtype=FLOAT64, device=device) for _ in range(2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_rmsprop_that_never_adapts_is_sgd(device, momentum, weight_decay, maximize):
    """alpha = 1 leaves s at 1: u = g, and the released weight decay is SGD's own."""
    params, twins = pair((6, 4), (3,), device=device)
    ours = RootFreeRMSprop(
        params,
        lr=0.1,
        alpha=1.0,
        initial_square_avg=1.0,
        damping=0.0,
        momentum=momentum,
        weight_decay=weight_decay,
        weight_decay_mode="momentum",
        batch_size=32,
        maximize=maximize,
    )
    # torch adds the decay after the sign of maximize, as here.
    sgd = torch.optim.SGD(
        twins, lr=0.1, momentum=momentum, weight_decay=weight_decay, maximize=maximize
    )
    for t in range(8):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        sgd.step()
    close(params, twins)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_on_unit_gradients_is_torch_adamw(device, weight_decay):
    """g = +-1 and B = 1 keep s at 1, which is its own root; beta1 = 0 needs no bias correction."""
    params, twins = pair((6, 4), (3,), device=device)
    settings = {"lr": 0.1, "betas": (0.0, 0.95), "weight_decay": weight_decay}
    ours = RootFreeAdamW(params, damping=1e-3, batch_size=1, **settings)
    theirs = torch.optim.AdamW(twins, eps=1e-3, **settings)
    for t in range(8):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            p.grad = p.grad.sign()
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    close(params, twins)


def test_adamw_without_memory_is_decoupled_rmsprop_without_memory(device):
    """betas = (0, b) and no bias correction: the gradient itself over the same s."""
    params, twins = pair((6, 4), device=device)
    settings = {"lr": 0.1, "damping": 1e-3, "weight_decay": 0.1, "batch_size": 8}
    adamw = RootFreeAdamW(params, betas=(0.0, 0.9), **settings)
    rmsprop = RootFreeRMSprop(twins, alpha=0.9, momentum=0.0, **settings)
    run(adamw, params, 6)
    run(rmsprop, twins, 6)
    close(params, twins)


@pytest.mark.parametrize("name", [name for name in DIAGONAL if name in SCALED])
def test_summed_and_averaged_loss_take_the_same_step(name, device):
    """Once s has forgotten its start (alpha = beta2 = 0), batch_size alone makes the two agree."""
    memory = {"betas": (0.9, 0.0)} if name.startswith("adamw") else {"alpha": 0.0}
    params, twins = pair((6, 4), (3,), device=device)
    memory |= {"damping": 0.0, "initial_square_avg": 1.0}
    averaged = build(name, params, batch_size=32, **memory)
    summed = build(name, twins, batch_size=1, **memory)
    for t in range(5):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = 32 * p.grad
        averaged.step()
        summed.step()
    close(params, twins)


def test_a_batch_size_that_changes_stays_right(device):
    """s is stored, not s / B: a step at batch 8 then one at batch 32 equals the formula."""
    (p,) = parameters((5,), dtype=FLOAT64, device=device)
    optimizer = RootFreeRMSprop([p], lr=0.0, alpha=0.5, initial_square_avg=1.0, batch_size=8)
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()  # s = 1 + (8 / 4 - 1) / 2 = 1.5
    optimizer.param_groups[0]["batch_size"] = 32
    optimizer.step()  # s = 1.5 + (32 / 4 - 1.5) / 2 = 4.75
    expected = torch.full_like(p, 4.75)
    torch.testing.assert_close(
        optimizer.state[p]["square_avg"], expected.detach(), rtol=1e-15, atol=0
    )


def test_the_momentum_buffer_exists_only_with_momentum(device):
    params = parameters((4,), (2,), device=device)
    optimizer = RootFreeRMSprop(params, momentum=0.0, batch_size=8)
    run(optimizer, params, 1)
    assert set(optimizer.state[params[0]]) == {"step", "square_avg"}
    optimizer.param_groups[0]["momentum"] = 0.9
    assert set(optimizer.state_dict()["state"][0]) == {"step", "square_avg", "momentum_buffer"}
    run(optimizer, params, 2, first=1)
    assert optimizer.state[params[0]]["momentum_buffer"].abs().min() > 0
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["momentum"] = 0.0
    set_grads(params, seed=9)
    optimizer.step()
    state, grad = optimizer.state[params[0]], params[0].grad
    damped = grad / (state["square_avg"] + optimizer.defaults["damping"])
    torch.testing.assert_close(state["momentum_buffer"], damped)

    twins = parameters((4,), (2,), device=device)
    other = RootFreeRMSprop(twins, momentum=0.0, batch_size=8)
    other.load_state_dict(saved)
    assert torch.equal(
        other.state[twins[1]]["momentum_buffer"], saved["state"][1]["momentum_buffer"]
    )
    other.load_state_dict(RootFreeRMSprop(twins, momentum=0.0, batch_size=8).state_dict())
    assert set(other.state[twins[0]]) == {"step", "square_avg"}


def test_momentum_that_a_scheduler_cycles(device):
    params = parameters((4,), device=device)
    optimizer = RootFreeRMSprop(params, batch_size=8)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    for t in range(5):
        set_grads(params, seed=t)
        optimizer.step()
        scheduler.step()
    assert optimizer.state[params[0]]["momentum_buffer"].abs().min() > 0


def test_mixed_dtypes_and_layouts_in_one_group(device):
    """Each parameter moves as it does alone, and a gap in a storage is never written."""
    base = torch.zeros(6, 8, device=device)
    leaves = [
        *parameters((5,), device=device),
        *parameters((4, 3), dtype=torch.bfloat16, device=device),
        *parameters((4, 3), dtype=torch.float16, device=device),
        *parameters((2, 3), dtype=FLOAT64, device=device),
        base[:, ::2].requires_grad_(),
        torch.randn(3, 4, device=device).t().requires_grad_(),
        torch.randn(2, 3, 4, 5, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_(),
        torch.randn((), device=device).requires_grad_(),
        torch.randn(0, 3, device=device).requires_grad_(),
        torch.randn(4).requires_grad_(),  # on the CPU among those of a GPU
    ]
    for name in DIAGONAL:
        alone = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in leaves]
        together = build(name, leaves)
        singles = [build(name, [p]) for p in alone]
        for t in range(3):
            set_grads(leaves, seed=t)
            for p, q in zip(leaves, alone, strict=True):
                q.grad = p.grad.clone()
            together.step()
            for optimizer in singles:
                optimizer.step()
        for p, q in zip(leaves, alone, strict=True):
            assert torch.equal(p, q), (name, p.shape, p.dtype)
    assert (base[:, 1::2] == 0).all()
    assert (base[:, ::2] != 0).all()


def test_gradients_of_any_strides(device):
    """Transposed, expanded and gapped gradients read as what they are."""
    for name in DIAGONAL:
        grads = [
            torch.randn(3, 4, device=device).t(),
            torch.randn(4, 1, device=device).expand(4, 3),
            torch.randn(4, 6, device=device)[:, ::2],
            torch.ones((), device=device).expand(4, 3),
        ]
        params = parameters(*[(4, 3)] * 4, device=device)
        twins = parameters(*[(4, 3)] * 4, device=device)
        for p, q, g in zip(params, twins, grads, strict=True):
            p.grad, q.grad = g, g.contiguous()
        build(name, params).step()
        build(name, twins).step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)


def test_a_non_finite_gradient_spoils_its_own_element_only(device):
    for name in DIAGONAL:
        for bad in (float("nan"), float("inf")):
            params, twins = (parameters((100,), device=device) for _ in range(2))
            optimizer, clean = build(name, params), build(name, twins)
            run(optimizer, params, 1)
            run(clean, twins, 1)
            set_grads(params, seed=0)
            twins[0].grad = params[0].grad.clone()
            params[0].grad[7] = bad
            optimizer.step()
            clean.step()
            others = torch.arange(100, device=device) != 7
            has_sign = name.startswith("sign") and bad == bad  # of an infinity
            assert bool(torch.isfinite(params[0][7])) == has_sign
            assert torch.equal(params[0][others], twins[0][others])
