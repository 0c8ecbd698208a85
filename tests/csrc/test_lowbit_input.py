"""Misuse of the operators on weights and states in fewer bytes: nothing may be half done."""

from __future__ import annotations

import pytest
import torch
from helpers.lowbit import E5M3, F16, F32, S8, assert_stored_equal, problem

NAN = float("nan")

pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("rootfree_fused::lowbit_adamw_", "CPU"),
    reason="no extension",
)


def second(key, value):
    def change(call):
        getattr(call, key)[1] = value

    return change


def second_of(key, k, value):
    def change(call):
        getattr(call, key)[k][1] = value

    return change


def others(**values):
    return lambda call: call.__dict__.update(values)


def codes(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


MISUSE = {
    "a gradient less": (lambda call: call.grads.pop(), "length"),
    "a residual less": (lambda call: call.residuals.pop(), "length"),
    "a scale less": (lambda call: call.scales[1].pop(), "length"),
    "no second state": (lambda call: call.states.__setitem__(1, []), "length"),
    "a seed less": (lambda call: call.seeds.pop(), "seeds and firsts"),
    "a first less": (lambda call: call.firsts.pop(), "seeds and firsts"),
    "a step less": (others(steps=torch.ones(1)), "steps"),
    "a step that is none": (others(steps=torch.tensor([1.0, NAN])), r"steps\[1\]"),
    "integer steps": (others(steps=torch.ones(2, dtype=torch.int64)), "steps"),
    "a transposed gradient": (second("grads", torch.rand(8, 64).bfloat16()), r"params\[1\].*shape"),
    "a flat residual": (second("residuals", codes(S8, 512)), r"params\[1\].*shape"),
    "a flat state": (second_of("states", 0, codes(S8, 512)), r"params\[1\].*shape"),
    "a double parameter": (second("params", torch.rand(64, 8).double()), "grads|params"),
    "a double gradient": (second("grads", torch.rand(64, 8).double()), r"grads\[1\].*dtype"),
    "a float16 gradient": (second("grads", torch.rand(64, 8).half()), r"grads\[1\].*dtype"),
    "float32 of a residual": (second("params", torch.rand(64, 8)), r"grads\[1\]|residuals\[1\]"),
    "an int32 residual": (second("residuals", codes(torch.int32, 64, 8)), r"residuals\[1\].*int8"),
    "a float16 state": (second_of("states", 0, codes(F16, 64, 8)), r"params\[1\] must be float32"),
    "no scales": (others(scales=[[], []]), r"params\[0\] need scales"),
    "scales of nothing": (second_of("states", 1, codes(F32, 64, 8)), r"params\[1\] need scales"),
    "a scale too few": (second_of("scales", 0, codes(F32, 1)), r"scales of params\[1\].*float32"),
    "a uint8 scale of S8": (second_of("scales", 0, codes(E5M3, 2)), r"params\[1\].*float32"),
    "a float32 scale of E5M3": (second_of("scales", 1, codes(F32, 2)), r"params\[1\].*uint8"),
    "strided scales": (second_of("scales", 0, codes(F32, 4)[::2]), r"params\[1\].*contiguous"),
    "stochastic with residuals": (others(stochastic=True), "stochastically"),
    "an expanded parameter": (
        second("params", torch.rand(8).bfloat16().expand(64, 8)),
        r"params\[1\].*expanded",
    ),
    "an expanded state": (
        second_of("states", 1, codes(E5M3, 64, 1).expand(64, 8)),
        r"params\[1\].*expanded",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    change, message = MISUSE[case]
    call = problem("adamw", [(64, 8), (64, 8)])
    change(call)
    before = call.copy()
    with pytest.raises(RuntimeError, match=message):
        call.run()
    assert_stored_equal(call, before)


def test_float32_is_not_rounded_stochastically():
    call = problem("adamw", weight="float32")
    call.stochastic = True
    before = call.copy()
    with pytest.raises(RuntimeError, match=r"params\[0\] cannot be rounded stochastically"):
        call.run()
    assert_stored_equal(call, before)


def test_scales_of_a_state_that_is_not_there():
    call = problem("rmsprop without buffer", states=(E5M3,))
    call.scales[1] = [codes(F32, 1) for _ in call.params]
    with pytest.raises(RuntimeError, match="not there"):
        call.run()
