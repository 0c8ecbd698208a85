"""Random models, strides, groups, settings, missing gradients and saves, against float64."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from conftest import DEVICES
from helpers.comparison import assert_no_worse_than
from helpers.layouts import cropped, expanded_rows, gapped, misaligned, reversed_axes, transposed
from helpers.optimizers import (
    DIAGONAL,
    SETTINGS,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)
from helpers.tensor_cores import float32_products
from helpers.truth import start, step_, stepped

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHAPES = [(), (0,), (1,), (7,), (33,), (4, 3), (1, 5), (0, 4), (6, 5), (5, 1, 4), (3, 2, 4)]
LAYOUTS = {
    "contiguous": (0, torch.clone),
    "gapped": (1, gapped),
    "transposed": (2, transposed),
    "misaligned": (0, misaligned),
    "cropped": (1, cropped),
    "reversed": (2, reversed_axes),
    "expanded": (1, expanded_rows),  # for gradients alone
}
OF_PARAMETERS = list(LAYOUTS)[:-1]


def laid_out(layout, tensor):
    """The tensor in other strides, where it has the axes that these need."""
    axes, place = LAYOUTS[layout]
    return place(tensor) if tensor.dim() >= axes else tensor


def dtype_of(name, dtype):
    """Factors in float64 or float32; bfloat16 ones have tests of their own."""
    if name in DIAGONAL:
        return {}
    return {"factor_dtype": torch.promote_types(dtype, torch.float32)}


def reload(optimizer, name):
    """A new optimizer on the same parameters, from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    resumed = build(name, groups, **dtype_of(name, groups[0]["params"][0].dtype))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


COPIES = {
    "none": lambda optimizer, name: optimizer,
    "file": reload,
    "deepcopy": lambda optimizer, name: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, name: pickle.loads(pickle.dumps(optimizer)),
}
CHANGES = {
    "lr": [0.0, 0.01, 0.1],
    "damping": [1e-4, 0.1],
    "weight_decay": [0.0, 0.3],
    "batch_size": [1, 50],
    "momentum": [0.0, 0.7],
    "update_interval": [1, 2],
    "maximize": [False, True],
}
TENSOR = st.tuples(st.sampled_from(SHAPES), st.sampled_from(OF_PARAMETERS))
CHANGE = st.sampled_from([(key, value) for key, values in CHANGES.items() for value in values])
STEP = st.fixed_dictionaries(
    {
        "missing": st.sets(st.integers(0, 5), max_size=3),
        "layout": st.sampled_from(list(LAYOUTS)),
        "copy": st.sampled_from(list(COPIES)),
        "change": st.none() | st.tuples(st.integers(0, 1), CHANGE),
    }
)
CASE = {
    "name": st.sampled_from(list(SETTINGS)),
    "groups": st.lists(st.lists(TENSOR, min_size=1, max_size=4), min_size=1, max_size=2),
    "steps": st.lists(STEP, min_size=1, max_size=6),
}


def deterministic(examples):
    return hypothesis.settings(
        derandomize=True, database=None, deadline=None, max_examples=examples
    )


class Trial:
    """An optimizer, and the settings that its groups must have, taken through drawn steps."""

    def __init__(self, name, groups, dtype, device):
        self.name, self.cls = name, SETTINGS[name][0]
        self.layouts = [layout for group in groups for _, layout in group]
        seeded = torch.Generator().manual_seed(0)
        params = [
            [
                laid_out(layout, torch.randn(shape, generator=seeded).to(device, dtype))
                for shape, layout in g
            ]
            for g in groups
        ]
        given = [{"params": [p.requires_grad_() for p in group]} for group in params]
        self.optimizer = build(name, given, **dtype_of(name, dtype))
        self.expected = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]

    def prepare(self, t, step):
        """Change a setting, go on with a copy and set gradients, as drawn."""
        if step["change"] is not None:
            place, (key, value) = step["change"]
            if place < len(self.expected) and key in self.expected[place]:
                self.expected[place][key] = value
                self.optimizer.param_groups[place][key] = value
        self.optimizer = COPIES[step["copy"]](self.optimizer, self.name)
        params = [p for p, _ in self.owned()]
        set_grads(params, seed=1 + t)
        for i, p in enumerate(params):
            p.grad = None if i in step["missing"] else laid_out(step["layout"], 4 * p.grad)

    def owned(self):
        """Each parameter with its group's expected settings."""
        return [
            (p, expected)
            for group, expected in zip(self.optimizer.param_groups, self.expected, strict=True)
            for p in group["params"]
        ]

    def check_gaps(self):
        """What lies between a parameter's elements is as it was."""
        for (p, _), layout in zip(self.owned(), self.layouts, strict=True):
            if layout in ("gapped", "cropped") and p.dim():
                nothing = torch.empty(0, dtype=p.dtype, device=p.device)
                everything = nothing.set_(p.untyped_storage()).clone()
                everything.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(7)
                assert (everything == 7).all()


def declare_buffers_(states, owned, dtype):
    """A group with momentum has buffers from then on, for its parameters without gradient too."""
    for state, (param, group) in zip(states, owned, strict=True):
        if group.get("momentum"):
            state.setdefault("momentum_buffer", torch.zeros(param.shape, dtype=dtype))


@deterministic(200)
@hypothesis.given(**CASE)
def test_a_float64_trajectory_is_the_specification_s(name, groups, steps):
    trial = Trial(name, groups, torch.float64, "cpu")  # a GPU runs the specification itself
    params = [p.detach().clone() for p, _ in trial.owned()]
    states = []
    for t, step in enumerate(steps):
        trial.prepare(t, step)
        if t == 0:  # state starts by the settings of when it is touched
            states = [start(trial.cls, p, group, torch.float64) for p, group in trial.owned()]
        declare_buffers_(states, trial.owned(), torch.float64)
        for q, state, (p, group) in zip(params, states, trial.owned(), strict=True):
            if p.grad is not None:
                step_(trial.cls, q, p.grad, state, group)
        trial.optimizer.step()
    for q, state, (p, _) in zip(params, states, trial.owned(), strict=True):
        kept = trial.optimizer.state[p]
        assert kept.keys() == state.keys()
        for key, expected in [("param", q), *state.items()]:
            actual = p.detach() if key == "param" else kept[key]
            scale = expected.abs().max() if expected.numel() else 1.0
            assert actual.shape == expected.shape
            assert ((actual - expected).abs() <= 1e-10 * scale).all(), key
    trial.check_gaps()


@pytest.mark.parametrize("device", DEVICES)
@deterministic(200)
@hypothesis.given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), **CASE)
def test_every_step_is_as_near_to_float64_as_the_eager_one(device, name, groups, steps, dtype):
    """From where the optimizer is, a step in float64 and one of the specification's in its dtypes.

    The parameters of a case are compared as one, like any state of theirs: of the few elements of a
    single one, an eager result can be exact by chance.
    """
    trial = Trial(name, groups, dtype, device)
    for t, step in enumerate(steps):
        trial.prepare(t, step)
        trial.optimizer.state_dict()  # declares the buffers that a changed momentum needs
        moved, eager, truth = [], [], []
        for p, group in trial.owned():
            if p.grad is None:
                continue
            for results, to in ((eager, None), (truth, torch.float64)):
                results.append(stepped(trial.cls, p, trial.optimizer.state[p], group, to))
            moved.append(p)
        trial.optimizer.step()
        ours = [{"param": p.detach(), **trial.optimizer.state[p]} for p in moved]
        for key in {key for state in truth for key in state}:
            a, e, b = (
                torch.cat([state[key].flatten() for state in states if key in state])
                for states in (ours, eager, truth)
            )
            if key == "step":
                assert torch.equal(a, b)
            else:  # 8: sums of up to 12 products in another order
                assert_no_worse_than(a, e, b, factor=8)
    trial.check_gaps()


# Soak and threads


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), *((torch.float32, d) for d in DEVICES)]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_1000_steps_do_not_drift_from_the_specification(name, dtype, device):
    """In float64 they are its steps; in float32 as near to those as its own in float32 are."""
    params = parameters((3, 2), (4,), dtype=dtype, device=device)
    optimizer = build(name, params, **{**dtype_of(name, dtype), "lr": 0.01})
    cls, group = type(optimizer), optimizer.param_groups[0]
    eager, truth = [], []
    for results, to in ((eager, dtype), (truth, torch.float64)):
        for p in params:
            q = p.detach().to("cpu", to, copy=True)
            state = start(cls, q, group, to)
            declare_buffers_([state], [(q, group)], to)
            results.append({"param": q, **state})
    for t in range(1000):
        set_grads(params, seed=t)
        for results, to in ((eager, dtype), (truth, torch.float64)):
            with float32_products(device):
                for p, state in zip(params, results, strict=True):
                    step_(cls, state["param"], p.grad.to("cpu", to), state, group)
        optimizer.step()
    for p, e, b in zip(params, eager, truth, strict=True):
        ours = {"param": p.detach(), **optimizer.state[p]}
        assert ours.keys() == b.keys()
        for key in b:
            if key == "step":
                assert ours[key] == b[key] == 1000
            elif dtype == torch.float64:
                assert ((ours[key].cpu() - b[key]).abs() <= 1e-9 * b[key].abs().max()).all(), key
            else:
                assert_no_worse_than(ours[key].cpu(), e[key], b[key], factor=8)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_threads_step_two_optimizers_as_each_alone(name, device):
    shapes = [(64, 48), (1000,), (5, 5), (64, 48)]

    def trained(seed):
        params = parameters(*shapes, device=device, seed=seed)
        optimizer = build(name, params)
        barrier.wait()
        run(optimizer, params, 8)
        results[seed] = snapshot(optimizer, params)

    results, barrier = {}, threading.Barrier(1)
    for seed in (0, 1):
        trained(seed)
    alone, results, barrier = results, {}, threading.Barrier(2)
    threads = [threading.Thread(target=trained, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert_identical(results[seed], alone[seed])
