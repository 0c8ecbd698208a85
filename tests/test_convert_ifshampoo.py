"""Training that an IFShampoo began, gone on with by a RootFreeShampoo."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from helpers.optimizers import assert_identical, parameters, run, set_grads, snapshot
from torch.optim.lr_scheduler import CosineAnnealingLR

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo, convert
from rootfree_fused.convert import from_ifshampoo
from rootfree_fused.reference import shape_scale

FLOAT64 = torch.float64
SHAPES = [(6, 5), (7,), (4, 3, 2), (), (6, 5)]


def begun(device, steps=5, dtype=FLOAT64, **settings):
    params = parameters(*SHAPES, dtype=dtype, device=device)
    source = IFShampoo(params, batch_size=8, damping=1e-3, factor_lr=0.4, **settings)
    run(source, params, steps)
    return source, params


def converted(source, params, **settings):
    optimizer = RootFreeShampoo(params, **settings)
    optimizer.load_state_dict(from_ifshampoo(source, optimizer))
    return optimizer


def test_the_first_step_goes_on_in_the_direction_of_the_momentum(device):
    """Where the gradient says nothing; rows as they are."""
    source, params = begun(device)
    optimizer = converted(source, params, lr=0.01, row_beta=None)
    before = [p.detach().clone() for p in params]
    buffers = [source.state[p]["momentum_buffer"] for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start, buffer in zip(params, before, buffers, strict=True):
        if p.dim() < 2:
            assert torch.equal(p, start)
            continue
        direction = buffer / buffer.square().mean().sqrt()
        rms = 0.3 * shape_scale(p.shape[0], p[0].numel())
        torch.testing.assert_close(p, start - 0.01 * rms * direction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FLOAT64])
def test_what_is_taken_along(dtype, device):
    source, params = begun(device, dtype=dtype)
    fresh = RootFreeShampoo(params)
    optimizer = converted(source, params)
    for p in params:
        state, start = optimizer.state[p], fresh.state[p]
        assert state.keys() == start.keys()
        if p.dim() < 2:
            assert_identical(list(state.values()), list(start.values()))
            continue
        assert state["step"] == 5
        assert (state["row_square_avg"] == 1).all()
        buffer = source.state[p]["momentum_buffer"]
        expected = buffer / buffer.square().mean().sqrt()
        torch.testing.assert_close(state["momentum_buffer"], expected, rtol=1e-6, atol=0)
        kept = [key for key in start if key.startswith(("gram", "factor"))]
        assert_identical([state[key] for key in kept], [start[key] for key in kept])


def test_a_state_dict_is_a_source_and_both_stay_as_they_are(device):
    source, params = begun(device)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    before = snapshot(source, params)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    by_file = converted(torch.load(file), twins)
    optimizer = RootFreeShampoo(params)
    unchanged = snapshot(optimizer, params)
    made = from_ifshampoo(source, optimizer)
    assert_identical(snapshot(optimizer, params), unchanged)
    optimizer.load_state_dict(made)
    assert_identical(snapshot(source, params), before)
    for each, tensors in ((optimizer, params), (by_file, twins)):
        run(each, tensors, 5, first=5)
    assert_identical(snapshot(by_file, twins), snapshot(optimizer, params))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_momentum_of_zero_stays_zero(steps, device):
    """Before the first step, and where there was none; it is then as good as new."""
    source, params = begun(device, steps, momentum=0.0 if steps else 0.5)
    optimizer = converted(source, params)
    for p in params:
        state = optimizer.state[p]
        assert state["step"] == (steps if p.dim() > 1 else 0)
        if p.dim() > 1:
            assert not state["momentum_buffer"].any()
    run(optimizer, params, 2)
    assert all(p.isfinite().all() for p in params)


def test_momenta_of_any_scale(device):
    source, params = begun(device, dtype=torch.float32)
    for p, factor in zip(params, (1e-30, 1.0, 1e30, 1.0, 1.0), strict=True):
        source.state[p]["momentum_buffer"].mul_(factor)
    optimizer = converted(source, params)
    for p in params:
        if p.dim() > 1:
            rms = optimizer.state[p]["momentum_buffer"].square().mean().sqrt().item()
            assert rms == pytest.approx(1, rel=1e-6)


def test_settings_stay_but_for_maximize(device):
    source, params = begun(device, maximize=True, lr=0.3, weight_decay=0.1, structures="diagonal")
    group = converted(source, params, lr=0.02).param_groups[0]
    fresh = RootFreeShampoo(params, lr=0.02).param_groups[0]
    assert group["maximize"] is True
    rest = fresh.keys() - {"params", "maximize"}
    assert {key: group[key] for key in rest} == {key: fresh[key] for key in rest}


def test_groups_may_be_others_and_a_schedule_counts_on(device):
    source, params = begun(device, steps=4)
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "update_interval": 3}]
    optimizer = converted(source, groups)
    late = optimizer.state[params[2]]
    for moves in (False, False, True, False):  # the steps 5 to 8, of which the 7th is due
        before = late["gram_0"].clone()
        set_grads(params, seed=9)
        optimizer.step()
        assert torch.equal(late["gram_0"], before) != moves


def test_bad_sources_are_told(device):
    source, params = begun(device)
    optimizer = RootFreeShampoo(params)
    with pytest.raises(TypeError, match="is a IFShampoo; pass a RootFreeShampoo"):
        from_ifshampoo(source, source)
    other = RootFreeAdamW(params, batch_size=8)
    for bad in (other, other.state_dict(), optimizer):
        with pytest.raises(ValueError, match="without factor_lr; pass an IFShampoo"):
            from_ifshampoo(bad, optimizer)
    with pytest.raises(ValueError, match="has 5 parameters but the optimizer has 4"):
        from_ifshampoo(source, RootFreeShampoo(params[:4]))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    with pytest.raises(ValueError, match="other parameters"):
        from_ifshampoo(source, RootFreeShampoo(twins))
    with pytest.raises(ValueError, match="state_dict"):
        from_ifshampoo({"state": {}}, optimizer)
    mixed = RootFreeShampoo(params)
    split = IFShampoo([{"params": [p], "maximize": p.dim() > 1} for p in params], batch_size=8)
    with pytest.raises(ValueError, match="had maximize"):
        from_ifshampoo(split, mixed)
    wrong = copy.deepcopy(source.state_dict())
    wrong["state"][0]["momentum_buffer"] = torch.zeros(5, 5)
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(from_ifshampoo(wrong, optimizer))


CONVERTERS = {
    RootFreeShampoo: {"from_ifshampoo"},
    IFShampoo: {"from_sirfshampoo", "from_released_code"},
    RootFreeAdamW: {"from_released_code"},
    RootFreeRMSprop: {"from_released_code"},
}


OTHERS = [torch.optim.AdamW, torch.optim.SGD, *CONVERTERS]


def begun_by(cls, params):
    has_scale = cls in CONVERTERS and cls is not RootFreeShampoo
    optimizer = cls(params, **({"batch_size": 8} if has_scale else {}))
    run(optimizer, params, 1)
    return optimizer


@pytest.mark.parametrize(
    ("cls", "other"), [(cls, other) for cls in CONVERTERS for other in OTHERS if other is not cls]
)
def test_a_load_from_another_class_says_what_leads_here(cls, other, device):
    params = parameters(*SHAPES, device=device)
    optimizer, saved = begun_by(cls, params), begun_by(other, params).state_dict()
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=f"begin with a new {cls.__name__} at an lr of") as told:
        optimizer.load_state_dict(saved)
    named = set(re.findall(r"convert\.(\w+)", str(told.value)))
    assert named == CONVERTERS[cls]
    for name in named:  # each takes this optimizer, and refuses the source alone
        with pytest.raises((ValueError, TypeError), match=r"source|state_dict"):
            getattr(convert, name)({}, optimizer)
    assert_identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("name", ["from_sirfshampoo", "from_released_code"])
def test_an_older_if_shampoo_is_two_conversions_away(name, device):
    """Which the converters say, that lead to an IFShampoo alone."""
    source, params = begun(device)
    optimizer = RootFreeShampoo(params)
    with pytest.raises(TypeError, match="IFShampoo, whose state from_ifshampoo then makes one of"):
        getattr(convert, name)(source.state_dict(), optimizer)
    optimizer.load_state_dict(from_ifshampoo(source.state_dict(), optimizer))


def test_a_schedule_goes_on_as_the_docs_say(device):
    """Built anew and stepped as often; the old one's state brings the source's lr."""
    source, params = begun(device, lr=0.5)
    never = RootFreeShampoo(params, lr=0.01)
    old, other = (CosineAnnealingLR(o, T_max=20) for o in (source, never))
    for _ in range(7):
        for each in (source, never, old, other):
            each.step()
    optimizer = converted(source, params, lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, T_max=20)
    optimizer.step()
    for _ in range(old.last_epoch):
        scheduler.step()
    for _ in range(3):
        assert optimizer.param_groups[0]["lr"] == never.param_groups[0]["lr"]
        for each in (optimizer, never, scheduler, other):
            each.step()
    scheduler.load_state_dict(old.state_dict())
    assert scheduler.base_lrs == [0.5]
