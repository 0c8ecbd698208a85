"""Saving, loading and copying, for every optimizer."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

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

pytestmark = pytest.mark.parametrize("name", SETTINGS)
SHAPES = [(7, 5), (11,), (), (0,), (3, 4, 2)]


def save_and_load(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.bfloat16, torch.float32, torch.float64, torch.float16],
}


@pytest.mark.parametrize("dtypes", DTYPES)
def test_resume_is_bit_exact(name, device, dtypes):
    """In the middle of an update interval, where there is one."""
    dtypes = itertools.cycle(DTYPES[dtypes])
    params = [
        torch.nn.Parameter(p.detach().to(dtype))
        for p, dtype in zip(parameters(*SHAPES, device=device), dtypes, strict=False)
    ]
    optimizer = build(name, params)
    run(optimizer, params, 4)
    saved = save_and_load(optimizer.state_dict())
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = build(name, resumed_params)
    resumed.load_state_dict(saved)
    assert_identical(snapshot(resumed, resumed_params), snapshot(optimizer, params))
    run(optimizer, params, 3, first=4)
    run(resumed, resumed_params, 3, first=4)
    assert_identical(snapshot(resumed, resumed_params), snapshot(optimizer, params))


@pytest.mark.parametrize("capturable", [False, True])
def test_state_read_on_the_cpu_goes_where_its_parameters_are(name, device, capturable, monkeypatch):
    """map_location="cpu", into an optimizer whose model was on another device when it was built."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)

    def build_model(on):
        model = torch.nn.ParameterList(parameters(*SHAPES, device=on))
        return model, build(name, model.parameters(), capturable=capturable)

    model, optimizer = build_model(device)
    params = list(model)
    run(optimizer, params, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)

    other, resumed = build_model("meta")
    other.to_empty(device=device)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_identical(snapshot(resumed, list(other)), snapshot(optimizer, params))
    run(optimizer, params, 3, first=4)
    run(resumed, list(other), 3, first=4)
    assert_identical(snapshot(resumed, list(other)), snapshot(optimizer, params))


def test_a_checkpoint_is_as_large_as_its_state(name):
    params = parameters(*[(8, 8)] * 100)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    nbytes = sum(v.numel() * v.element_size() for v in tensors)
    overhead = 1000 * len(tensors)  # what pickle says of a tensor besides its bytes
    assert len(pickle.dumps(optimizer.state_dict())) < nbytes + overhead
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert nbytes < len(file.getvalue()) < nbytes + overhead
    assert len(pickle.dumps(optimizer)) < nbytes + 100 * (256 + 1000) + overhead


def test_loading_writes_in_place_and_leaves_the_callers_dict(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    saved = save_and_load(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    run(optimizer, params, 2, first=2)
    tensors = {id(v) for p in params for v in optimizer.state[p].values()}
    optimizer.load_state_dict(state_dict=saved)
    run(optimizer, params, 1, first=4)
    assert {id(v) for p in params for v in optimizer.state[p].values()} == tensors
    assert saved["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        for k, v in state.items():
            assert torch.equal(saved["state"][key][k], v)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_continues_identically(name, device, how):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 3)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    twins = twin.param_groups[0]["params"]
    assert all(a is not b for a, b in zip(params, twins, strict=True))
    run(optimizer, params, 3, first=3)
    run(twin, twins, 3, first=3)
    assert_identical(snapshot(twin, twins), snapshot(optimizer, params))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_float32_state_passes_between_parameters_of_fewer_and_more_bits(name, device, dtypes):
    """It is what both keep, so that no bit of it is touched."""
    params, others = (parameters(*SHAPES, dtype=dtype, device=device) for dtype in dtypes)
    optimizer, resumed = build(name, params), build(name, others)
    run(optimizer, params, 4)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    assert_identical(
        snapshot(resumed, others)[len(others) :], snapshot(optimizer, params)[len(params) :]
    )
    run(resumed, others, 2, first=4)


def test_a_count_of_steps_may_be_a_number(name, device):
    params = parameters((3,), device=device)
    optimizer = build(name, params)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = 5
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["step"], torch.tensor(5.0))
    run(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 6


def corruptions(state_dict):
    """Broken checkpoints by the words that their error must have."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    key = next(k for k in state[0] if k != "step")
    value = state[0][key]

    def with_state(**changes):
        changed = {k: v for k, v in {**state[0], **changes}.items() if v is not None}
        return {"state": {**state, 0: changed}, "param_groups": groups}

    return {
        r"has keys \[\]": {"state": {k: v for k, v in state.items() if k}, "param_groups": groups},
        "without param_groups": {"state": state},
        "without param_groups, state; pass what": {"model": {}, "optimizer": state_dict},
        "has shape": with_state(**{key: value[:1]}),
        "would lose bits": with_state(**{key: value.double()}),
        "has keys": with_state(**{key: None}),
        "same settings": with_state(factor_9=value),
        "must be a tensor": with_state(**{key: [1.0]}),
        "none of its groups": {"state": {**state, 99: state[0]}, "param_groups": groups},
        "groups of": {"state": state, "param_groups": [*groups, {**groups[0], "params": []}]},
        r"name parameters \[0\] twice": {
            "state": {0: state[0]},
            "param_groups": [{**groups[0], "params": [0] * len(groups[0]["params"])}],
        },
        "no weight_decay": {
            "state": state,
            "param_groups": [{k: v for k, v in groups[0].items() if k != "weight_decay"}],
        },
        "lr is -1": {"state": state, "param_groups": [{**groups[0], "lr": -1.0}]},
    }


def test_a_checkpoint_that_does_not_fit_changes_nothing(name, device):
    params = parameters((3, 2), (4,), device=device)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    broken = corruptions(optimizer.state_dict())
    before = snapshot(optimizer, params)
    groups = [dict(g) for g in optimizer.param_groups]
    for words, state_dict in broken.items():
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(state_dict)
        assert_identical(snapshot(optimizer, params), before)
        assert [dict(g) for g in optimizer.param_groups] == groups


def test_a_checkpoint_of_torch_s_own_optimizers_is_refused(name, device):
    params = parameters((3,), device=device)
    optimizer = build(name, params)
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        other = cls(params)
        set_grads(params, seed=0)
        other.step()
        with pytest.raises(ValueError, match=f"not saved by {type(optimizer).__name__}"):
            optimizer.load_state_dict(other.state_dict())


def test_load_hooks_run_in_order(name, device):
    params = parameters((3,), device=device)
    optimizer = build(name, params)
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post"]


def test_state_of_what_no_group_has_is_left_out(name):
    """A look at what is no parameter leaves an empty entry, and an exchanged parameter a full one.

    torch raises a KeyError of an address for either.
    """
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, 1)
    (other,) = parameters((9, 2))
    assert optimizer.state[other] == {}
    assert list(optimizer.state_dict()["state"]) == list(range(len(params)))
    optimizer.param_groups[0]["params"].pop(0)
    saved = optimizer.state_dict()
    assert list(saved["state"]) == list(range(len(params) - 1))
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["params"].insert(0, other)
    saved = optimizer.state_dict()
    assert list(saved["state"]) == list(range(len(params)))
    assert saved["state"][0]["step"] == 0
