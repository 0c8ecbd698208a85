"""state_dict() is a whole and private copy, which other tools can send and wrappers can add to."""

from __future__ import annotations

import collections
import copy
import pickle

import pytest
import torch
from helpers.optimizers import SETTINGS, assert_identical, build, parameters, run, snapshot

from rootfree_fused.reference import matrix

pytestmark = pytest.mark.parametrize("name", SETTINGS)
SHAPES = [(7, 5), (11,), (), (7, 5), (3, 4, 2)]


def test_a_state_dict_is_a_copy_that_no_step_touches(name):
    params = parameters(*SHAPES)
    optimizer = build(name, params, lr=torch.tensor(0.05))
    for steps in (0, 3):
        run(optimizer, params, steps)
        saved = optimizer.state_dict()
        kept = copy.deepcopy(saved)
        run(optimizer, params, 3)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        assert saved["param_groups"][0]["lr"] == kept["param_groups"][0]["lr"]
        for i, state in kept["state"].items():
            assert_identical(list(saved["state"][i].values()), list(state.values()))
        storages = [t.untyped_storage()._cdata for s in saved["state"].values() for t in s.values()]
        assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda state: state.copy()])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_alone_is_copied_as_that_of_torch(name, steps, duplicate):
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, steps)
    twin = duplicate(optimizer.state)
    assert type(twin) is collections.defaultdict
    assert len(twin) == len(params)
    for mine, theirs in zip(optimizer.state.values(), twin.values(), strict=True):
        assert_identical(list(mine.values()), list(theirs.values()))
    assert pickle.loads(pickle.dumps(optimizer.state)).keys()


def test_a_rollback_is_as_if_nothing_had_happened(name):
    params, twins = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, straight = build(name, params), build(name, twins)
    run(optimizer, params, 3)
    run(straight, twins, 3)
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in params]
    run(optimizer, params, 2, first=50)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        torch._foreach_copy_(params, values)
    run(optimizer, params, 4, first=3)
    run(straight, twins, 4, first=3)
    assert_identical(snapshot(optimizer, params), snapshot(straight, twins))


def test_a_checkpoint_has_no_integers_and_either_form_of_a_factor_loads(name):
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, 4)
    saved = optimizer.state_dict()
    tensors = [t for state in saved["state"].values() for t in state.values()]
    assert {t.dtype for t in tensors} <= {torch.float32, torch.float64, torch.bfloat16}
    old = copy.deepcopy(saved)  # as it was saved in two parts
    for state in old["state"].values():
        for key in [key for key in state if key.startswith("factor_")]:
            own = optimizer.state[params[0]]
            if f"{key}_residual" in own and state[key].dim() == 2:
                state[key], state[f"{key}_residual"] = matrix.split(state[key])
    for each in (saved, old):
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = build(name, twins)
        resumed.load_state_dict(each)
        assert_identical(snapshot(resumed, twins), snapshot(optimizer, params))


def test_what_wrappers_keep_in_the_state_is_saved_and_loaded(name):
    params = parameters((4, 4), (3,))
    optimizer = build(name, params)
    optimizer.state[params[1]]["slow"] = torch.full((3,), 2.0, dtype=torch.float64)
    run(optimizer, params, 2)
    optimizer.state[params[0]]["slow"] = params[0].detach().clone()
    optimizer.state[params[0]]["calls"] = 7
    optimizer.state["trac"] = {"scale": torch.ones(2), "calls": 3}
    saved = optimizer.state_dict()
    run(optimizer, params, 1)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = build(name, twins)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state[twins[0]]["slow"], saved["state"][0]["slow"])
    assert resumed.state[twins[0]]["slow"] is not saved["state"][0]["slow"]
    assert resumed.state[twins[0]]["calls"] == 7
    assert resumed.state[twins[1]]["slow"].dtype == torch.float64
    assert torch.equal(resumed.state["trac"]["scale"], torch.ones(2))
    run(resumed, twins, 1)
    twin = copy.deepcopy(resumed)
    assert twin.state[twin.param_groups[0]["params"][0]]["calls"] == 7


def test_a_setting_that_state_was_allocated_for_is_refused_in_a_save_too(name):
    params = parameters((4, 3))
    optimizer = build(name, params)
    run(optimizer, params, 1)
    if "structures" not in optimizer.defaults:
        optimizer.state[params[0]]["step"] = torch.zeros(3)
        words = r"parameter 0 of group 0 .*step has shape \(\), but it has \(3,\)"
    else:
        optimizer.param_groups[0]["structures"] = "diagonal"
        words = "structures of group 0 was .*; set it back"
    with pytest.raises(ValueError, match=words):
        optimizer.state_dict()
