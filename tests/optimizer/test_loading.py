"""Damaged, foreign and hostile checkpoints: refused with a reason, and nothing has changed.

State dicts are mutated one place at a time, at random; what a load that raises leaves is compared
by bits, and by the steps that follow, with an optimizer that never saw the checkpoint.
"""

from __future__ import annotations

import copy
import re

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

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHAPES = [(3, 4), (5,), (2, 3)]
DAMAGED = "damaged or was saved after the run diverged"


def build_groups(name):
    """Two groups, so that an earlier one could have moved."""
    params = parameters(*SHAPES)
    return params, build(name, [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])


def at_a_place(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def without_storage(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


# Of a tensor of state, by the words of the error. Each is for floating state of one axis or more.
TENSORS = {
    "on meta": (lambda t: t.to("meta"), "device meta"),
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "a nested tensor"),
    "quantized": (  # torch warns that it will go
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        "a quantized tensor",
    ),
    "freed": (without_storage, "storage was freed"),
    "int64": (lambda t: t.long() + 2**40 + 1, "would lose bits"),
    "int32": (lambda t: t.int() + 16777217, "would lose bits"),
    "bool": (lambda t: t > 0, "would lose bits"),
    "complex": (lambda t: torch.complex(t.float(), t.float()), "would lose bits"),
    "float64": (lambda t: t.double(), "would lose bits"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "would lose bits"),
    "other shape": (lambda t: t[:1].repeat(9, *[1] * (t.dim() - 1)), "has shape"),
    "nan": (lambda t: at_a_place(t, torch.nan), f"holds nan: .*{DAMAGED}"),
    "inf": (lambda t: at_a_place(t, torch.inf), f"holds inf: .*{DAMAGED}"),
    "-inf": (lambda t: at_a_place(t, -torch.inf), f"holds -inf: .*{DAMAGED}"),
    "list": (lambda t: t.tolist(), "a list; it must be a tensor"),
    "None": (lambda t: None, "None; it must be a tensor"),
    "string": (lambda t: "state", "a str; it must be a tensor"),
}
STEPS = {
    "nan": (float("nan"), DAMAGED),
    "inf": (torch.tensor(torch.inf), DAMAGED),
    "negative": (-5, DAMAGED),
    "half": (2.5, DAMAGED),
    "more than float32 counts": (torch.tensor(2**24 + 1), "holds: .*damaged"),
    "1e300": (torch.tensor(1e300, dtype=torch.float64), DAMAGED),
    "10**400": (10**400, DAMAGED),
    "bool": (True, "must be a tensor"),
    "a bool tensor": (torch.tensor(True), "would lose bits"),
    "complex": (torch.tensor(1 + 1j), "would lose bits"),
    "two": (torch.ones(2), "has shape"),
    "on meta": (torch.ones((), device="meta"), "device meta"),
    "None": (None, "None; it must be a tensor"),
}
OUT_OF_RANGE = {
    "lr": [-1.0, float("nan"), 10**400, torch.tensor(1e-2, device="meta"), torch.ones(2), "fast"],
    "damping": [-1e-4, float("inf"), 10**400, None, True],
    "weight_decay": [-1.0, 10**400, "none"],
    "batch_size": [0, -8, None, 10**400, float("nan")],
    "maximize": [None, 2, "yes"],
    "capturable": ["no"],
}
# Changes of a whole state dict, by the words of the error.
FORMS = {
    "None, not a dict": lambda d: d.update(state=None),
    "a list, not a dict": lambda d: d.update(state=list(d["state"].values())),
    "None, not a list": lambda d: d.update(param_groups=None),
    "a dict, not a list": lambda d: d.update(param_groups={}),
    "without param_groups; pass": lambda d: d.pop("param_groups"),
    "parameter 1 is None, not a dict": lambda d: d["state"].update({1: None}),
    "has keys": lambda d: (d["state"][1].pop("step"), d["state"][1].update({7: 0, None: 1})),
    r"has keys \[\]": lambda d: d["state"].pop(2),
    "none of its groups names": lambda d: d["state"].update({9: {}}),
    "group 1 is None, not a dict": lambda d: d["param_groups"].__setitem__(1, None),
    r"groups of \[2\] parameters": lambda d: d["param_groups"].pop(),
    "None as params, not a list": lambda d: d["param_groups"][1].pop("params"),
    r"groups of \[1, 1\] parameters": lambda d: d["param_groups"][0]["params"].pop(),
    r"name parameters \[2\] twice": lambda d: d["param_groups"][0].update(params=[0, 2]),
    "by a list, not by a number": lambda d: d["param_groups"][0].update(params=[[0], 1]),
    "2 params but param_names": lambda d: d["param_groups"][0].update(param_names=["a"]),
}


# Settings that are not in every checkpoint.
LATER = ("merge_axes", "batch_axes", "combine", "block_size", "hierarchical_sizes")
LATER += ("param_residual", "state_format", "rounding_seed", "second_moment")


def mutations(saved, data):
    """A place of a state dict at random, what to put there, and the words that refuse it."""
    kinds = ["form", "cut short", "setting", "missing", "step", "tensor", "square"]
    kind = data.draw(st.sampled_from(kinds))
    damaged = copy.deepcopy(saved)
    group = data.draw(st.sampled_from([0, 1]))
    settings = damaged["param_groups"][group]
    place = data.draw(st.sampled_from(sorted(saved["state"])))
    state = damaged["state"][place]
    if kind == "form":
        words = data.draw(st.sampled_from(sorted(FORMS)))
        FORMS[words](damaged)
    elif kind == "cut short":
        later = {"params", *LATER}  # not in every checkpoint
        key = data.draw(st.sampled_from(sorted(settings.keys() - later)))
        del settings[key]
        words = f"group {group} has no {key}.*cut short"
    elif kind == "setting":
        key = data.draw(st.sampled_from(sorted(OUT_OF_RANGE)))
        settings[key] = data.draw(st.sampled_from(OUT_OF_RANGE[key]))
        words = key
    elif kind == "missing":
        del state[data.draw(st.sampled_from(sorted(state)))]
        words = f"parameter {place} has keys .* needs"
    elif kind == "step":
        state["step"], words = STEPS[data.draw(st.sampled_from(sorted(STEPS)))]
        words = f"parameter {place}: step .*{words}"
    else:
        keys = [k for k, v in state.items() if v.dim() and v.is_floating_point()]
        if kind == "square":
            keys = [k for k in keys if k in ("square_avg", "exp_avg_sq")]
        hypothesis.assume(keys)
        key = data.draw(st.sampled_from(sorted(keys)))
        change, words = TENSORS[data.draw(st.sampled_from(sorted(TENSORS)))]
        if kind == "square":
            change, words = (lambda t: at_a_place(t, -0.5)), f"holds -0.5, .*{DAMAGED}"
        state[key] = change(state[key])
        words = f"parameter {place}: {key} .*{words}"
    return damaged, words


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("name", SETTINGS)
@hypothesis.settings(deadline=None, max_examples=40, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_a_load_that_is_refused_changes_nothing(name, taken, data):
    """Cold, and after steps that stacked state and prepared launches."""
    source, saver = build_groups(name)
    run(saver, source, 2)
    damaged, words = mutations(saver.state_dict(), data)
    (params, optimizer), (others, twin) = build_groups(name), build_groups(name)
    for own, their in ((params, optimizer), (others, twin)):
        run(their, own, taken)
    before = snapshot(optimizer, params)
    groups = [dict(group) for group in optimizer.param_groups]
    tensors = [v for p in params for v in optimizer.state[p].values()]

    with pytest.raises((ValueError, TypeError), match=words) as error:
        optimizer.load_state_dict(damaged)
    hypothesis.note(str(error.value))
    assert_identical(snapshot(optimizer, params), before)
    assert [dict(group) for group in optimizer.param_groups] == groups
    held = [v for p in params for v in optimizer.state[p].values()]
    assert all(a is b for a, b in zip(held, tensors, strict=True))
    for own, their in ((params, optimizer), (others, twin)):
        run(their, own, 2, first=taken)
    assert_identical(snapshot(optimizer, params), snapshot(twin, others))


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_no_state_dict_is_a_type_error(name):
    _, optimizer = build_groups(name)
    saved = optimizer.state_dict()
    for value, words in ((None, "None"), ([saved], "a list"), ("checkpoint.pt", "a str")):
        with pytest.raises(TypeError, match=f"state_dict is {words}; pass what state_dict"):
            optimizer.load_state_dict(value)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_load_holds_nothing_of_the_checkpoint_and_may_read_its_own_state(name):
    """Tensors that change places: a copy in place, one by one, would write what it still reads."""
    params = parameters((4, 4), (4, 4))
    optimizer = build(name, params)
    run(optimizer, params, 3)
    first, second = (dict(optimizer.state[p]) for p in params)
    before = snapshot(optimizer, params)[2:]
    saved = {"state": {0: second, 1: first}, "param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(saved)
    half = len(before) // 2
    assert_identical(snapshot(optimizer, params)[2:], before[half:] + before[:half])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_load_cures_state_that_cannot_be_written(name):
    source, saver = build_groups(name)
    run(saver, source, 2)
    params, optimizer = build_groups(name)
    run(optimizer, params, 3)
    state = optimizer.state[params[0]]
    for key, value in state.items():
        state[key] = value.to("meta") if value.dim() else 3
    optimizer.state[params[1]] = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape)
        for key, value in optimizer.state[params[1]].items()
    }
    optimizer.load_state_dict(saver.state_dict())
    assert_identical(snapshot(optimizer, params)[3:], snapshot(saver, source)[3:])


def test_an_error_names_the_parameter():
    model = torch.nn.Linear(3, 2)
    optimizer = build("adamw", list(model.named_parameters()))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["exp_avg_sq"][0] = -1.0
    words = "state_dict of parameter 1 (bias): exp_avg_sq holds -1.0"
    with pytest.raises(ValueError, match=re.escape(words)):
        optimizer.load_state_dict(saved)


def test_the_default_device_is_not_asked():
    params, optimizer = build_groups("adamw")
    run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer, params)
    for state in saved["state"].values():
        state["step"] = 2
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
    assert_identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lazy_parameter_trains_as_in_torch_and_loads_after_its_first_call(name):
    def lazy():
        torch.manual_seed(0)
        model = torch.nn.LazyLinear(3)
        return model, build(name, model.parameters())

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(4, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = lazy()
    fresh = optimizer.state_dict()
    assert fresh["state"].keys().isdisjoint({0, 1})  # LazyLinear's bias is lazy too
    optimizer.load_state_dict(fresh)
    train(model, optimizer, 2)
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    resumed, other = lazy()
    with pytest.raises(ValueError, match=r"parameter 0 has no parameter yet.*call the model once"):
        other.load_state_dict(saved)
    assert len(other.state) == 0
    resumed(torch.ones(4, 5))
    resumed.load_state_dict(weights)
    other.load_state_dict(saved)
    for trained, by in ((model, optimizer), (resumed, other)):
        train(trained, by, 2)
    assert_identical(
        snapshot(other, list(resumed.parameters())), snapshot(optimizer, list(model.parameters()))
    )


def test_factors_of_which_one_is_zero_are_damaged():
    """All of them are zero before the first gradient, and one alone would hold the matrix still."""
    (p,) = parameters((5, 3))
    optimizer = build("ifshampoo", [p])
    set_grads([p], 0)
    optimizer.step()
    before = snapshot(optimizer, [p])
    saved = optimizer.state_dict()
    saved["state"][0]["factor_1"].zero_()
    with pytest.raises(ValueError, match=f"factor_1 is zero and other factors are not.*{DAMAGED}"):
        optimizer.load_state_dict(saved)
    assert_identical(snapshot(optimizer, [p]), before)


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_a_checkpoint_from_before_a_setting_is_what_it_was(name):
    """It was stepped as the setting's default steps; one of other parameters does not fit."""
    settings = [key for key in LATER if key in SETTINGS[name][0]._added_later]
    assert len(settings) == (8 if name.startswith("ifshampoo") else 7)
    params, others = parameters((6, 4), (4,)), parameters((6, 4), (4,))
    optimizer, twin = build(name, params), build(name, others)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    for key in settings:
        del saved["param_groups"][0][key]
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    twin.load_state_dict(saved)
    assert all(twin.param_groups[0][k] == optimizer.param_groups[0][k] for k in settings)
    for one, own in ((optimizer, params), (twin, others)):
        run(one, own, 2, first=2)
    assert_identical(snapshot(twin, others), snapshot(optimizer, params))
    stack = build(name, parameters((2, 6, 4), (2, 4)), batch_axes=1)
    with pytest.raises(ValueError, match="has shape"):
        stack.load_state_dict(saved)
