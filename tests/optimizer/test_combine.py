"""Parameters that are one matrix: the steps are those of the parameters side by side."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from helpers.optimizers import assert_identical, set_grads, snapshot
from helpers.stacks import CLASSES, SETTINGS, use_reference
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bench.host import as_on_cuda
from rootfree_fused import IFShampoo, convert

F32, BF16 = torch.float32, torch.bfloat16
by_name = pytest.mark.parametrize("name", CLASSES)
# Shapes of the parts of each unit, by what they are.
SETS = {
    "linear": ((6, 5), (6,)),
    "convolution": ((4, 3, 2, 2), (4,)),
    "normalisation": ((7,), (7,)),
    "equal": ((3, 4), (3, 4), (3, 4)),
}


def side_by_side(tensors):
    first, *others = tensors
    if all(other.shape == first.shape for other in others):
        return torch.stack(tensors, -1)
    return torch.cat([first.flatten(1), others[0][:, None]], 1)


class Twins:
    """Parameters that `combine` joins, and those that are joined already."""

    def __init__(self, name, sets=SETS, dtype=F32, device="cpu", **settings):
        self.sets = [
            [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
            for shapes in sets.values()
        ]
        self.joint = [torch.nn.Parameter(side_by_side([*map(torch.detach, s)])) for s in self.sets]
        count = iter(range(100))
        combine = tuple(tuple(next(count) for _ in own) for own in self.sets)
        self.params = [p for own in self.sets for p in own]
        self.settings = {"combine": combine, **SETTINGS[name], **settings}
        self.optimizer = CLASSES[name](self.params, **self.settings)
        self.other = CLASSES[name](self.joint, **{**SETTINGS[name], **settings})

    def step(self, seed):
        set_grads(self.params, seed)
        for own, joint in zip(self.sets, self.joint, strict=True):
            joint.grad = side_by_side([p.grad for p in own])
        self.optimizer.step()
        self.other.step()

    def assert_equal(self):
        """Every bit of the parts, their momenta, and what the first owns."""
        for own, joint in zip(self.sets, self.joint, strict=True):
            assert torch.equal(side_by_side([*map(torch.detach, own)]), joint)
            states = [self.optimizer.state[p] for p in own]
            expected = self.other.state[joint]
            for key, value in expected.items():
                if value.shape == joint.shape and not key.startswith(("factor", "gram")):
                    assert torch.equal(side_by_side([state[key] for state in states]), value), key
                else:
                    assert torch.equal(states[0][key], value), key
            assert all(s.keys() == {"step", "momentum_buffer"} for s in states[1:])
            assert all(torch.equal(s["step"], expected["step"]) for s in states)


@pytest.mark.parametrize("body", ["own", "reference"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)], ids=str)
@by_name
def test_steps_are_those_of_the_parameters_side_by_side(name, dtypes, body, monkeypatch):
    dtype, factor_dtype = dtypes
    twins = Twins(name, dtype=dtype, factor_dtype=factor_dtype)
    if body == "reference":
        use_reference(monkeypatch)
    for seed in range(4):
        twins.step(seed)
        twins.assert_equal()


@by_name
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_steps_in_triton(name):
    offline = pytest.importorskip("helpers.offline")
    twins = Twins(name, {key: SETS[key] for key in ("linear", "normalisation")})
    with offline.interpreted(), as_on_cuda():
        for seed in range(2):
            twins.step(seed)
    twins.assert_equal()


@pytest.mark.parametrize(
    "settings", [{"update_interval": 2}, {"max_dense_dim": 5}, {"capturable": True}], ids=str
)
@by_name
def test_settings_are_those_of_one_parameter(name, settings, device):
    twins = Twins(name, device=device, **settings)
    for seed in range(5):
        twins.step(seed)
    twins.assert_equal()


@by_name
def test_what_has_no_factors_together_is_stepped_apart(name):
    params, others = ([torch.nn.Parameter(torch.tensor(x)) for x in (1.0, 2.0)] for _ in range(2))
    optimizer = CLASSES[name](params, combine=((0, 1),), **SETTINGS[name])
    apart = CLASSES[name](others, **SETTINGS[name])
    for seed in range(2):
        set_grads(params, seed)
        set_grads(others, seed)
        optimizer.step()
        apart.step()
    assert_identical(snapshot(optimizer, params), snapshot(apart, others))


def test_without_momentum_the_bias_owns_its_count_alone():
    twins = Twins("ifshampoo", momentum=0.0)
    for seed in range(3):
        twins.step(seed)
    assert twins.optimizer.state[twins.params[1]].keys() == {"step"}
    assert torch.equal(side_by_side([*map(torch.detach, twins.sets[0])]), twins.joint[0])


@by_name
def test_a_compiled_step_is_the_same(name):
    twins = Twins(name, {key: SETS[key] for key in ("linear", "normalisation")})
    twins.optimizer.step = torch.compile(twins.optimizer.step, backend="eager")
    for seed in range(2):
        twins.step(seed)
    twins.assert_equal()


@by_name
def test_a_compiled_step_tells_of_a_missing_gradient_before_a_count_moves(name):
    twins = Twins(name, {key: SETS[key] for key in ("linear", "normalisation")})
    twins.optimizer.step = torch.compile(twins.optimizer.step, backend="eager")
    twins.step(0)
    set_grads(twins.params, 1)
    twins.params[1].grad = None
    before = snapshot(twins.optimizer, twins.params)
    with pytest.raises(ValueError, match="joins to it, has none"):
        twins.optimizer.step()
    assert_identical(snapshot(twins.optimizer, twins.params), before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@by_name
def test_it_resumes_to_the_bit(name, how, steps):
    twins = Twins(name, factor_dtype=BF16)
    for seed in range(steps):
        twins.step(seed)
    if how == "deepcopy":
        twins = copy.deepcopy(twins)
    elif how == "pickle":
        twins = pickle.loads(pickle.dumps(twins))
    else:
        file = io.BytesIO()
        torch.save(twins.optimizer.state_dict(), file)
        file.seek(0)
        twins.optimizer = CLASSES[name](twins.params, **{**twins.settings, "factor_dtype": BF16})
        twins.optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert twins.optimizer.param_groups[0]["combine"] == twins.settings["combine"]
    for seed in range(steps, 4):
        twins.step(seed)
    twins.assert_equal()


def model():
    """Of modules that join, one of three parameters that do not, and one of one."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(9, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 6),
        torch.nn.GRU(6, 4, bias=True),
        torch.nn.Linear(6, 3, bias=False),
    )


@by_name
def test_modules_join_what_they_own(name):
    own = model()
    optimizer = CLASSES[name](own.named_parameters(), combine="module", **SETTINGS[name])
    shapes = {
        key: tuple(state["factor_1"].shape) if "factor_1" in state else None
        for key, param in own.named_parameters()
        if (state := optimizer.state[param])
    }
    assert shapes["1.weight"] == (2, 2)
    assert shapes["2.weight"] == (9, 9)
    assert shapes["1.bias"] is shapes["2.bias"] is None
    assert shapes["3.weight_ih_l0"] == (6, 6)
    assert shapes["4.weight"] == (6, 6)
    set_grads([*own.parameters()], 0)
    optimizer.step()


def test_modules_need_names():
    with pytest.raises(ValueError, match=r"pairs parameters by name; pass model.named_parameters"):
        IFShampoo(model().parameters(), batch_size=1, combine="module")


def test_parts_of_a_stack_are_joined_by_member():
    weight, bias = torch.randn(3, 6, 5), torch.randn(3, 6)
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(bias)]
    joint = torch.nn.Parameter(torch.cat([weight, bias[..., None]], -1))
    optimizer = IFShampoo(params, batch_size=1, combine=((1, 0),), batch_axes=1)
    other = IFShampoo([joint], batch_size=1, batch_axes=1)
    for seed in range(3):
        set_grads(params, seed)
        params[0].grad[1], params[1].grad[1] = 0, 0
        joint.grad = torch.cat([params[0].grad, params[1].grad[..., None]], -1)
        optimizer.step()
        other.step()
    assert torch.equal(torch.cat([params[0], params[1][..., None]], -1), joint)
    assert torch.equal(optimizer.state[params[0]]["factor_1"], other.state[joint]["factor_1"])


@by_name
def test_a_part_without_a_gradient_is_told_before_anything_moves(name):
    twins = Twins(name, {"linear": SETS["linear"], "normalisation": SETS["normalisation"]})
    twins.step(0)
    before = snapshot(twins.optimizer, twins.params)
    for missing, given in ((1, 0), (2, 3)):
        set_grads(twins.params, 1)
        twins.params[missing].grad = None
        message = f"in group 0, parameter {given} has a gradient but parameter {missing}, which"
        with pytest.raises(ValueError, match=f"{message} .* has none; give both or neither"):
            twins.optimizer.step()
        assert_identical(snapshot(twins.optimizer, twins.params), before)
    twins.params[3].grad = None  # of both: the others are stepped
    twins.optimizer.step()
    (_, linear), (_, norm) = ((p, twins.optimizer.state[p]["step"]) for p in twins.params[::2])
    assert (linear.item(), norm.item()) == (2, 1)


BAD = [
    ("pairs", r"combine is 'pairs'; pass 'none', 'module', or a tuple of tuples of whole"),
    (True, r"combine is True; pass 'none'"),
    (((0, 1.0),), r"combine is .*; pass 'none'"),
    (((0,),), r"combine is \(\(0,\),\) in a group of 4 parameters; pass tuples of two"),
    (((0, 4),), r"in a group of 4 parameters; pass tuples of two positions or more"),
    (((0, 1), (1, 2)), r"each position at most once"),
    (((0, 2),), r"joins parameter 0 and parameter 2, of shapes \(6, 5\) and \(5,\); join a weight"),
    (((0, 3),), r"joins parameter 0 and parameter 3, whose dtype is torch.float32 and torch.bf"),
]


@pytest.mark.parametrize(("combine", "words"), BAD)
@by_name
def test_what_does_not_join_is_refused(name, combine, words):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 5), (6,), (5,), (6,))]
    params[3].data = params[3].detach().bfloat16()
    with pytest.raises(ValueError, match=words):
        CLASSES[name](params, combine=combine, **SETTINGS[name])


def test_a_frozen_part_is_refused_by_name():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    words = "parameter 0 (weight) and parameter 1 (bias), whose requires_grad is True and False"
    with pytest.raises(ValueError, match=re.escape(words)):
        IFShampoo(layer.named_parameters(), batch_size=1, combine="module")


def test_nothing_converts_to_joint_parameters():
    layer = torch.nn.Linear(3, 2)
    source = IFShampoo(layer.parameters(), batch_size=1)
    optimizer = CLASSES["shampoo"](layer.parameters(), combine=((0, 1),))
    with pytest.raises(ValueError, match=r"combine of group 0 is .* build the optimizer with"):
        convert.from_ifshampoo(source, optimizer)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("combine", ["module", ((0, 1),)], ids=str)
@by_name
def test_it_passes_through_torch_distributed(name, combine, flat):
    """The setting and all of the state, whose keys differ between the parts."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    convolution, other = torch.nn.Conv2d(2, 3, 2), torch.nn.Conv2d(2, 3, 2)
    (optimizer, params), (resumed, others) = (
        (
            CLASSES[name](list(own.named_parameters()), combine=combine, **SETTINGS[name]),
            list(own.parameters()),
        )
        for own in (convolution, other)
    )
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    saved = get_optimizer_state_dict(convolution, optimizer, options=options)
    other.load_state_dict(convolution.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert resumed.param_groups[0]["combine"] == combine
    for own, one in ((params, optimizer), (others, resumed)):
        set_grads(own, 2)
        one.step()
    assert_identical(snapshot(resumed, others), snapshot(optimizer, params))
