"""Momentum buffers: those that settings turn off and on, and those that were lost."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.optimizers import SETTINGS, assert_identical, build, parameters, run, snapshot

pytestmark = pytest.mark.parametrize("name", SETTINGS)


def test_momentum_turned_off_and_on_with_a_parameter_unfrozen_between(name):
    params = parameters((4, 3), (5,), (4, 3))
    optimizer = build(name, params, **({} if "adamw" in name else {"momentum": 0.9}))
    params[2].requires_grad_(False)
    run(optimizer, params[:2], 2)
    if "momentum" in optimizer.defaults:
        optimizer.param_groups[0]["momentum"] = 0.0
    params[2].requires_grad_(True)
    before = params[2].detach().clone()
    run(optimizer, params, 2)
    assert not torch.equal(params[2], before)
    assert len({tuple(sorted(optimizer.state[p])) for p in params[::2]}) == 1


def test_momentum_turned_on_right_after_a_load(name):
    params, twins = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    changes = {"momentum": 0.0} if "momentum" in build(name, params).defaults else {}
    optimizer, other = build(name, params, **changes), build(name, twins, **changes)
    for of, own in ((optimizer, params), (other, twins)):
        run(of, own, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for of, own in ((optimizer, params), (other, twins)):
        if changes:
            of.param_groups[0]["momentum"] = 0.9
        run(of, own, 3, first=3)
    assert_identical(snapshot(optimizer, params), snapshot(other, twins))
    assert not changes or all("momentum_buffer" in optimizer.state[p] for p in params)


MOMENTA = {"momentum_buffer", "momentum_buffer_scale"}


@pytest.mark.parametrize("lost", ["all", "one"])
@pytest.mark.parametrize("formats", [{}, {"state_format": "8bit"}], ids=str)
def test_a_momentum_buffer_that_was_lost_is_told(name, formats, lost):
    params = parameters((40, 30), (300,))
    optimizer = build(name, params, **formats)
    run(optimizer, params, 2)
    keys = sorted(MOMENTA & optimizer.state[params[1]].keys())
    if not keys:
        return
    for key in keys if lost == "all" else keys[-1:]:
        del optimizer.state[params[1]][key]
    before = [p.detach().clone() for p in params]
    for refused in (lambda: run(optimizer, params, 1, first=2), optimizer.state_dict):
        with pytest.raises(ValueError, match=f"parameter 1 of group 0 lacks .*'{keys[-1]}'"):
            refused()
    assert all(map(torch.equal, params, before))
    optimizer.state.pop(params[1])
    run(optimizer, params, 1, first=2)


def test_momentum_buffers_go_while_there_is_no_momentum(name):
    params = parameters((4, 3), (5,), (4, 3))
    optimizer = build(name, params)
    if not optimizer.defaults.get("momentum"):
        return
    run(optimizer, params, 2)
    optimizer.param_groups[0]["momentum"] = 0.0
    params[2].grad = None
    run(optimizer, params[:2], 1, first=2)
    for p in params:
        del optimizer.state[p]["momentum_buffer"]
    run(optimizer, params[:2], 1, first=3)
    optimizer.param_groups[0]["momentum"] = 0.9
    for steps, own in enumerate((params[:2], params[2:], params), 4):
        for p in params:
            p.grad = None
        run(optimizer, own, 1, first=steps)
        assert all("momentum_buffer" in optimizer.state[p] for p in own)
    del optimizer.state[params[0]]["momentum_buffer"]
    with pytest.raises(ValueError, match="lacks 'momentum_buffer'"):
        run(optimizer, params, 1, first=7)
