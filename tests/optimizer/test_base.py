"""Groups, declared state and the step, for every optimizer."""

from __future__ import annotations

import pytest
import torch
from helpers.optimizers import (
    SETTINGS,
    accepted,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.parametrize("name", SETTINGS)
SHAPES = [(7, 5), (11,), (), (0,), (3, 4, 2)]


# Declared state


def test_state_is_there_before_the_first_step_and_keeps_its_keys(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    before = {p: set(optimizer.state[p]) for p in params}
    assert all(keys >= {"step"} and len(keys) >= 2 for keys in before.values())
    set_grads(params[:2], seed=0)
    optimizer.step()
    assert {p: set(optimizer.state[p]) for p in params} == before
    for p in params:
        for key, value in optimizer.state[p].items():
            assert isinstance(value, torch.Tensor)
            assert value.device == (torch.device("cpu") if key == "step" else p.device)
            if not key.startswith(("factor", "gram", "row")):
                assert value.shape == (() if key == "step" else p.shape)
                assert value.dtype == torch.float32
            assert not value.requires_grad
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_dtype(name, device, dtype, state):
    params = parameters((3,), dtype=dtype, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    kept = {k: v for k, v in optimizer.state[params[0]].items() if not k.startswith("factor")}
    assert kept.pop("step").dtype == torch.float32
    assert {value.dtype for value in kept.values()} <= {state}


def test_capturable_counts_on_the_device_and_changes_no_number(name, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    plain, capturable = build(name, params), build(name, twins, capturable=True)
    run(plain, params, 3)
    run(capturable, twins, 3)
    assert all(capturable.state[p]["step"].device == p.device for p in twins)
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a, b)


# Gradients


def test_gradients_are_never_written(name, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        params = parameters(*SHAPES, dtype=dtype, device=device)
        optimizer = build(name, params)
        set_grads(params, seed=1)
        grads = [p.grad for p in params]
        before = [g.clone() for g in grads]
        versions = [g._version for g in grads]
        optimizer.step()
        for p, g, b, v in zip(params, grads, before, versions, strict=True):
            assert p.grad is g
            assert torch.equal(g, b)
            assert g._version == v


def test_a_parameter_without_gradient_keeps_everything(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    for missing in ([0], [1, 3], list(range(len(params)))):
        set_grads(params, seed=3)
        for i in missing:
            params[i].grad = None
        skipped = [params[i] for i in missing]
        before = snapshot(optimizer, skipped)
        counts = [optimizer.state[p]["step"].item() for p in params]
        optimizer.step()
        assert_identical(snapshot(optimizer, skipped), before)
        for i, p in enumerate(params):
            assert optimizer.state[p]["step"].item() == counts[i] + (i not in missing)


def test_a_parameter_that_skips_steps_matches_one_that_is_alone(name, device):
    params = parameters((4, 3), (4, 3), device=device)
    alone = parameters((4, 3), (4, 3), device=device)[1:]
    both, single = build(name, params), build(name, alone)
    for t in range(6):
        set_grads(params, seed=t)
        alone[0].grad = params[1].grad.clone()
        if t % 2:
            params[1].grad = alone[0].grad = None
        both.step()
        single.step()
    assert torch.equal(params[1], alone[0])
    assert both.state[params[1]]["step"].item() == 3


def test_a_backward_through_a_changed_parameter_raises(name, device):
    (weight,) = parameters((3, 3), device=device)
    optimizer = build(name, [weight])
    loss = (weight**2).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_refused_and_nothing_changes(name, device):
    params = parameters((4, 3), (4, 3), device=device)
    optimizer = build(name, [{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, seed=0)
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(optimizer, params)
    with pytest.raises(TypeError, match=r"sparse=False .*to_dense"):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)


# Step


def test_closure_runs_with_gradients_and_its_loss_is_returned(name, device):
    (weight,) = parameters((3,), device=device)
    optimizer = build(name, [weight])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(weight, before)
    assert optimizer.step() is None


def test_lr_zero_moves_state_but_no_parameter(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params, lr=0.0)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 2)
    assert_identical([p.detach() for p in params], before)
    start = build(name, parameters(*SHAPES, device=device)).state.values()
    for old, p in zip(start, params[:2], strict=False):
        state = optimizer.state[p]
        assert any(not torch.equal(state[k], old[k]) for k in old if k != "step")


def test_maximize_is_minimize_of_the_negated_gradient(name, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    down, up = build(name, params), build(name, twins, maximize=True)
    for t in range(3):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = -p.grad
        down.step()
        up.step()
    assert_identical(snapshot(up, twins), snapshot(down, params))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_equals_float_lr_and_is_not_written(name, shape, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    lr = torch.full(shape, 0.0625, device=device)
    by_float, by_tensor = build(name, params, lr=0.0625), build(name, twins, lr=lr)
    run(by_float, params, 50)
    run(by_tensor, twins, 50)
    assert_identical(snapshot(by_tensor, twins), snapshot(by_float, params))
    assert lr.item() == 0.0625
    assert by_tensor.param_groups[0]["lr"] is lr
    by_tensor.param_groups[0]["lr"] = lr.bfloat16()  # 1/16 is exact in it
    run(by_float, params, 1, first=5)
    run(by_tensor, twins, 1, first=5)
    assert_identical(snapshot(by_tensor, twins), snapshot(by_float, params))
    by_tensor.param_groups[0]["lr"] = lr
    lr.fill_(0.0)
    before = [p.detach().clone() for p in twins]
    run(by_tensor, twins, 1, first=5)
    assert_identical([p.detach() for p in twins], before)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (0,)])
def test_a_tensor_lr_is_taken_where_torch_takes_it(name, shape, device):
    """torch.optim takes any tensor of one element, and of no other number."""
    params = parameters((3,), device=device)
    try:
        torch.optim.AdamW(params, lr=torch.full(shape, 0.1), capturable=True)
    except ValueError:
        with pytest.raises(ValueError, match=r"lr is .*; pass a float, or one floating nu"):
            build(name, params, lr=torch.full(shape, 0.1))
    else:
        assert build(name, params, lr=torch.full(shape, 0.1)).defaults["lr"].shape == shape


def test_hyperparameters_change_between_steps_and_differ_by_group(name, device):
    params = parameters((5,), (5,), device=device)
    with torch.no_grad():
        params[1].copy_(params[0])
    optimizer = build(name, [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.0}])
    set_grads(params, seed=0)
    params[1].grad = params[0].grad.clone()
    start = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], start)
    assert torch.equal(params[1], start)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.0, 0.1
    first = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], first)
    assert not torch.equal(params[1], start)


def test_every_batch_size_is_the_group_s_own(name, device):
    params = parameters((5,), (5,), device=device)
    larger = accepted(name, {"batch_size": 1000})
    optimizer = build(name, [{"params": [params[0]]}, {"params": [params[1]], **larger}])
    set_grads(params, seed=0)
    params[1].grad = params[0].grad.clone()
    optimizer.step()
    if "batch_size" not in optimizer.defaults:
        assert torch.equal(*(optimizer.state[p]["exp_avg"] for p in params))
        return
    key = {"rmsprop": "square_avg", "adamw": "exp_avg_sq", "ifshampoo": "square_avg"}
    key = "factor_0" if name == "ifshampoo-axes" else key[name.split("-")[0]]
    small, large = (optimizer.state[p][key] for p in params)
    if key == "factor_0":  # the inverse factor: larger where less was seen
        small, large = large.diag(), small.diag()
    assert (large > small).all()


def test_named_parameters_added_groups_and_repr(name, device):
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = build(name, model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    run(optimizer, list(model.parameters()), 1)
    (extra,) = parameters((4,), device=device)
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    run(optimizer, [*model.parameters(), extra], 2)
    assert optimizer.state[extra]["step"].item() == 2
    assert optimizer.state[model.weight]["step"].item() == 3
    assert "maximize: False" in repr(optimizer)


def test_schedulers_and_hooks_work(name, device):
    params = parameters((3,), device=device)
    optimizer = build(name, params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for t in range(4):
        set_grads(params, seed=t)
        optimizer.step()
        scheduler.step()
    assert calls == ["pre", "post"] * 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_changed_hyperparameter_is_checked_before_anything_moves(name, device):
    params = parameters((3,), (3,), device=device)
    optimizer = build(name, [{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, seed=0)
    optimizer.step()
    before = snapshot(optimizer, params)
    optimizer.param_groups[1]["damping"] = float("nan")
    with pytest.raises(ValueError, match="damping is nan"):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)
