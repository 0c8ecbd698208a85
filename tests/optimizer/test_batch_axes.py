"""Stacks of matrices (experts, heads): each member is stepped as a parameter of its own."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.optimizers import assert_identical, snapshot
from helpers.stacks import CLASSES, OPERATORS, SETTINGS, Twins, use_reference

from bench.host import as_on_cuda
from rootfree_fused import IFShampoo, RootFreeShampoo, convert

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Gradients of zero by step: a member that sees nothing at first, and one that does later.
ZERO = [((0, 1),), ((0, 1), (1, 0)), (), ((0, 2),), ()]
by_name = pytest.mark.parametrize("name", CLASSES)
# torch warns that nothing is distributed here; the interpreter is numpy, which reports the x / 0
# that a gradient of zero leaves to be selected away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
]


@pytest.mark.parametrize("body", ["own", "reference"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)], ids=str)
@by_name
def test_a_stack_is_its_members(name, dtypes, body, monkeypatch):
    """To the bit; dense, and dense beside diagonal, the first two stacks in one bucket."""
    dtype, factor_dtype = dtypes
    twins = Twins(
        name,
        *((3, 16, 12), (2, 16, 12), (2, 12, 40)),
        dtype=dtype,
        factor_dtype=factor_dtype,
        max_dense_dim=16,
    )
    if body == "reference":
        use_reference(monkeypatch)
    for seed, zero in enumerate(ZERO):
        step_and_check(twins, seed, zero)
    sizes = [len(bucket.factors[0]) for bucket in twins.optimizer._plans[0].buckets]
    assert sorted(sizes) == [2, 5]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@by_name
def test_a_stack_is_its_members_in_triton(name, dtype, monkeypatch):
    """By plans, of which the gradients move at every step but the first; no operator is asked."""
    offline = pytest.importorskip("helpers.offline")
    twins = Twins(name, (2, 16, 12), (1, 16, 12), dtype=dtype, factor_dtype=dtype)
    with offline.interpreted(), as_on_cuda():
        for operator in OPERATORS.values():
            monkeypatch.setattr(torch.ops.rootfree_fused, operator, None)
        for seed in range(3):
            step_and_check(twins, seed, [(0, seed)] if seed < 2 else [])
    (bucket,) = twins.optimizer._plans[0].buckets
    assert len(bucket.factors[0]) == 3


def step_and_check(twins, seed, zero):
    """A member without a gradient keeps its factors and what they learn from; others do not."""
    state = twins.optimizer.state[twins.stacks[0]]
    before = snapshot_of_factors(state)
    twins.step(seed, zero)
    still = {member for owner, member in zero if owner == 0}
    for key, value in before.items():
        same = {i for i, old in enumerate(value) if torch.equal(old, state[key][i])}
        assert same >= still, (key, seed)
        assert same == still or key.endswith("residual"), (key, seed)
    twins.assert_equal()


def snapshot_of_factors(state):
    return {k: v.clone() for k, v in state.items() if k.startswith(("factor_", "gram_"))}


@pytest.mark.parametrize(
    "settings",
    [
        {"update_interval": 2},
        {"structures": ("diagonal", "dense")},
        {"maximize": True},
        {"capturable": True},
    ],
    ids=str,
)
@by_name
def test_settings_are_each_members(name, settings, device):
    twins = Twins(name, (3, 8, 12), (1, 8, 12), (2, 8, 1, 12), (2, 7), device=device, **settings)
    for seed in range(4):
        twins.step(seed, [(0, seed % 3)])
    twins.assert_equal()


@pytest.mark.parametrize(
    ("name", "vector_method"),
    [
        ("ifshampoo", "rmsprop"),
        ("ifshampoo", "factor"),
        ("shampoo", "adam"),
        ("shampoo", "rootfree"),
    ],
)
def test_members_may_be_vectors(name, vector_method, device):
    twins = Twins(name, (3, 9), (2, 1, 5), (2, 4, 3), device=device, vector_method=vector_method)
    for seed, zero in enumerate(ZERO):
        twins.step(seed, zero)
    twins.assert_equal()


@by_name
def test_several_batch_axes(name, device):
    """Of any strides, and axes of size 1 among them."""
    twins = Twins(name, (2, 3, 8, 12), (1, 1, 8, 12), (2, 2, 4, 3, 3), batch_axes=2, device=device)
    stack = twins.stacks[0]
    stack.data = stack.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert not stack.is_contiguous()
    for seed in range(3):
        twins.step(seed, [(0, 4)])
    twins.assert_equal()
    state = twins.optimizer.state[stack]
    assert (state["factor_0"].shape, state["factor_1"].shape) == ((2, 3, 8, 8), (2, 3, 12, 12))


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "dcp"])
@by_name
def test_a_stack_resumes_to_the_bit(name, how, steps, tmp_path):
    """Before its members have started, too."""
    twins = Twins(name, (3, 8, 12), (2, 8, 12), (2, 5), factor_dtype=BF16)
    for seed in range(steps):
        twins.step(seed, ZERO[seed])
    if how == "deepcopy":
        twins = copy.deepcopy(twins)
    elif how == "pickle":
        twins = pickle.loads(pickle.dumps(twins))
    else:
        resumed = copy.deepcopy(twins)
        resumed.optimizer = CLASSES[name](
            resumed.stacks, batch_axes=1, factor_dtype=BF16, **SETTINGS[name]
        )
        resumed.optimizer.load_state_dict(through(how, twins.optimizer, tmp_path))
        twins = resumed
    for seed in range(steps, len(ZERO)):
        twins.step(seed, ZERO[seed])
    twins.assert_equal()
    (bucket,) = twins.optimizer._plans[0].buckets
    assert len(bucket.factors[0]) == 5


def through(how, optimizer, path):
    """The state_dict as a file gives it back."""
    saved = optimizer.state_dict()
    if how == "dcp":
        dcp.save({"optimizer": saved}, checkpoint_id=path, no_dist=True)
        read = {"optimizer": copy.deepcopy(saved)}
        for state in read["optimizer"]["state"].values():
            for value in state.values():
                value.zero_()
        dcp.load(read, checkpoint_id=path, no_dist=True)
        return read["optimizer"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@by_name
def test_a_stack_is_one_call(name, monkeypatch):
    """However many stacks and members there are; and a step on known tensors makes no view anew."""
    twins = Twins(name, (3, 16, 12), (2, 16, 12), (1, 16, 12), factor_dtype=F32)
    calls = []
    run = getattr(torch.ops.rootfree_fused, OPERATORS[name])

    def counted(params, *rest, **scalars):
        calls.append(params)
        run(params, *rest, **scalars)

    monkeypatch.setattr(torch.ops.rootfree_fused, OPERATORS[name], counted)
    for seed in range(2):
        twins.set_grads(seed)
        twins.optimizer.step()
    first, second = calls
    assert len(first) == 6
    assert all(a is b for a, b in zip(first, second, strict=True))


@by_name
def test_what_does_not_fit_is_refused(name):
    def build(shape, **settings):
        return CLASSES[name]([torch.nn.Parameter(torch.ones(shape))], **SETTINGS[name], **settings)

    cases = [((8, 64), 2, "0 or 1"), ((8, 6, 4), 3, "0 or 1 or 2"), ((8, 64), 3, "0 or 1")]
    for shape, batch_axes, cure in [*cases, ((8,), 1, "0, in a group of its own")]:
        message = re.escape(
            f"batch_axes={batch_axes} leaves a parameter of shape {shape} no axis; "
        )
        with pytest.raises(ValueError, match=f"{message}pass {cure}$"):
            build(shape, batch_axes=batch_axes)
    for value, error in ((-1, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match=f"batch_axes is {value}.*pass a whole number >= 0"):
            build((8, 64, 2), batch_axes=value)
    optimizer = build((3, 4, 5), batch_axes=1)
    optimizer.state_dict()
    optimizer.param_groups[0]["batch_axes"] = 0
    with pytest.raises(ValueError, match=r"batch_axes of group 0 was 1 .* set it back"):
        optimizer.step()
    flat, saved = build((3, 4, 5)), build((3, 4, 5), batch_axes=1).state_dict()
    saved["param_groups"][0]["batch_axes"] = 0
    with pytest.raises(ValueError, match=r"has shape \(3, 4.*\) but this model needs \(3,"):
        flat.load_state_dict(saved)


@by_name
def test_a_stack_of_nothing(name):
    """No state but counts, and no step."""
    empty = torch.nn.Parameter(torch.ones(0, 4, 5))
    optimizer = CLASSES[name]([empty], batch_axes=1, **SETTINGS[name])
    empty.grad = torch.ones_like(empty)
    optimizer.step()
    assert not any(value.numel() for key, value in optimizer.state[empty].items() if key != "step")


@pytest.mark.parametrize("key", ["factor_0", "gram_1"])
def test_a_member_that_a_checkpoint_damaged_is_refused(key):
    """A factor that has not started beside one that has, or a square below 0."""
    name = "ifshampoo" if key == "factor_0" else "shampoo"
    twins = Twins(name, (3, 8, 12))
    twins.step(0, [(0, 1)])
    saved = twins.optimizer.state_dict()
    twins.optimizer.load_state_dict(saved)
    value = saved["state"][0][key][2]
    value.zero_() if key == "factor_0" else value.diagonal()[3:4].neg_()
    before = snapshot(twins.optimizer, twins.stacks)
    with pytest.raises(ValueError, match=f"{key}.* damaged"):
        twins.optimizer.load_state_dict(saved)
    assert_identical(snapshot(twins.optimizer, twins.stacks), before)


def test_a_stack_is_converted_by_member():
    twins = Twins("ifshampoo", (3, 8, 12), (2, 5))
    for seed in range(2):
        twins.step(seed)
    for source, params, batch_axes in (
        (twins.optimizer, twins.stacks, 1),
        (twins.alone, [p for own in twins.members for p in own], 0),
    ):
        converted = RootFreeShampoo(params, batch_axes=batch_axes)
        converted.load_state_dict(convert.from_ifshampoo(source, converted))
        if batch_axes:
            twins.optimizer = converted
        else:
            twins.alone = converted
    twins.assert_equal()
    twins.step(2)
    twins.assert_equal()


def test_first_axes_of_a_batch_are_kept_with_the_rest():
    """(1, 8, 12) has a batch of one, where without batch axes its first axis would be dropped."""
    param = torch.nn.Parameter(torch.ones(1, 8, 12))
    optimizer = IFShampoo([param], batch_size=1, batch_axes=1)
    assert optimizer.state[param]["factor_0"].shape == (1, 8, 8)


def test_stacks_start_whose_blocks_of_8_bits_run_over_members():
    stack, vectors = parameters = [
        torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((40, 11, 11), (40, 121))
    ]
    formats = {"param_residual": 8, "state_format": "8bit"}
    optimizer = IFShampoo(parameters, batch_size=1, batch_axes=1, **formats)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[stack]["momentum_buffer"].dtype == torch.int8
    assert optimizer.state[vectors]["momentum_buffer"].dtype == torch.float32
    assert all((optimizer.state[p]["step"] == 1).all() for p in parameters)
