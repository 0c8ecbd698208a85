"""The C++ bodies on weights and states in fewer bytes against the specification, to the bit."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from helpers.layouts import channels_last, gapped, reversed_axes, transposed
from helpers.lowbit import (
    BF16,
    E5M3,
    EXACT,
    F32,
    METHODS,
    S8,
    WEIGHTS,
    Problem,
    assert_stored_equal,
    problem,
)
from helpers.operators import ADAMW, RMSPROP, SIGN, VECTOR_ADAM

from rootfree_fused import ops
from rootfree_fused.reference import formats

# The sign of an average that is nearly 0 may be either; that of a gradient is what it is.
SIGN_FIRST = {**SIGN, "sign_last": False}
GENERAL = {"rmsprop": RMSPROP, "adamw": ADAMW, "sign": SIGN_FIRST, "vector_adam": VECTOR_ADAM}
PAIRS = [(F32, F32), (BF16, BF16), (S8, E5M3), (E5M3, S8), (S8, S8), (E5M3, BF16), (F32, E5M3)]
NAN, INF = float("nan"), float("inf")

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        ops.backends()["cpu"].startswith("reference") and not shutil.which("c++"),
        reason="no extension, and no compiler to build it",
    ),
]


def grad_dtypes(weight):
    return {WEIGHTS[weight][0], F32}


@functools.cache
def specified(method, weight, states, grad):
    return problem(method, weight=weight, states=states, grad=grad).specified()


@pytest.mark.parametrize("name", ["rmsprop_", "adamw_", "sign_", "vector_adam_"])
def test_there_is_a_body(name):
    operator = f"rootfree_fused::lowbit_{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_format_has_the_specified_bits(method, weight):
    for states in PAIRS:
        for grad in grad_dtypes(weight):
            actual = problem(method, weight=weight, states=states, grad=grad).run()
            assert_stored_equal(actual, specified(method, weight, states, grad))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("with_parts", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_sign_of_gradients_and_those_of_micro_batches(maximize, with_parts):
    scalars = {**EXACT["lowbit_sign_"], "sign_last": False, "maximize": maximize}
    for states in PAIRS:
        actual = problem("sign", states=states, scalars=scalars)
        if with_parts:
            parts = [torch.randint(-4, 5, p.shape).float() for p in actual.params]
            actual.more = {"parts": parts, "part_weight": 0.25}
        expected = actual.copy().specified()
        assert_stored_equal(actual.run(), expected)


@pytest.mark.usefixtures("isa")
def test_many_tensors_and_steps():
    sizes = torch.randint(0, 3000, (60,)).tolist()
    actual = problem("adamw", [(n,) for n in sizes])
    expected = actual.copy()
    for _ in range(2):
        actual.run()
        expected.specified()
    assert_stored_equal(actual, expected)


def test_a_scalar_is_a_tensor_of_one_element():
    vector = problem("adamw", [(1,)])
    scalar = vector.copy()
    for tensors in (scalar.params, scalar.grads, scalar.residuals, *scalar.states):
        tensors[:] = [t.view(()) for t in tensors]
    vector.run()
    scalar.run()
    for a, e in zip(scalar.written(), vector.written(), strict=True):
        assert torch.equal(a.view(1), e)


@pytest.mark.parametrize("decoupled", [True, False])
def test_either_weight_decay(decoupled):
    actual = problem("rmsprop", states=(E5M3, S8))
    actual.scalars["decoupled"] = decoupled
    expected = actual.copy().specified()
    assert_stored_equal(actual.run(), expected)


# Numbers

PASSING = {**RMSPROP, "alpha": 1.0, "damping": 1.0, "weight_decay": 0.0, "momentum": 0.0}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-149, 1e-40, 2.0**-126, 3e-38, 2.0**-100, 2.0**-101, 1e-30]
SPECIAL += [65504.0, 1e30, 3.3895e38, 3.39e38, 3.4e38, 3.4028234663852886e38]


def passing(values, weight, buffer):
    """A call after which the weight is -values and the momentum buffer values."""
    result = Problem("lowbit_rmsprop_", [values.shape], weight, (F32, buffer), F32, PASSING, lr=1.0)
    result.grads = [values]
    for tensors in (result.params, result.residuals, *result.states):
        for tensor in tensors:
            tensor.zero_()
    return result


def all_binades():
    """Upper halves of float32, all of them, with random lower ones, NaN and infinity among them."""
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.randint(0, 1 << 16, (1 << 16,), dtype=torch.int32)
    halves = torch.tensor([0x7F, 0x80, 0x7F7F, 0x7F80, 0x8000, 0xFFFF], dtype=torch.int32)
    edges = halves[torch.randint(0, len(halves), (1 << 16,))]
    return torch.cat([high, high | low, high | edges]).view(F32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_number_is_rounded_as_specified(weight):
    actual = passing(all_binades(), weight, BF16)
    expected = actual.copy().specified()
    assert_stored_equal(actual.run(), expected)
    assert actual.states[1][0].isinf().sum() == 2  # no finite number has become infinite


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("buffer", [S8, E5M3])
def test_blocks_of_every_scale(buffer):
    """The largest of a block is special, the others are spread below it, or all are equal."""
    largest = torch.tensor([s * x for x in [*SPECIAL, INF, NAN] for s in (1.0, -1.0)])
    spread = torch.exp2(-40 * torch.rand(len(largest), 256)) * largest[:, None]
    spread = torch.where(torch.rand(spread.shape) < 0.1, 0.0, spread)
    spread[:, 17] = largest
    equal = largest[:, None].expand(-1, 256)
    values = torch.cat([spread, equal, torch.randn(3, 256)]).flatten()[:-100]
    actual = passing(values, "bfloat16 + 16", buffer)
    expected = actual.copy().specified()
    assert_stored_equal(actual.run(), expected)
    for call in (actual, expected):  # what was encoded is decoded, and added to
        call.scalars = {**call.scalars, "momentum": 1.0}
        call.params[0].zero_()
        call.residuals[0].zero_()
    expected.specified()
    assert_stored_equal(actual.run(), expected)


@pytest.mark.usefixtures("isa")
def test_what_a_residual_may_meet():
    """Every upper half beside residuals of all kinds, whoever wrote either of them."""
    high = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    for weight, least in (("bfloat16 + 8", -(2**7)), ("bfloat16 + 16", -(2**15))):
        residuals = torch.tensor([least, least + 1, -1, 0, 1, -least - 1])
        scalars = {**EXACT["lowbit_rmsprop_"], "decoupled": True}
        actual = Problem("lowbit_rmsprop_", [(6, 1 << 16)], weight, (F32,), scalars=scalars, lr=0.0)
        actual.params = [high.expand(6, -1).clone()]
        actual.residuals[0].copy_(residuals[:, None])
        expected = actual.copy().specified()
        assert_stored_equal(actual.run(), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_gradient_that_is_not_finite_hurts_its_block_alone(value):
    plain = problem("adamw", [(1000,), (300,)])
    hurt = plain.copy()
    hurt.grads[0][300] = value
    plain.run()
    hurt.run()
    for (a, _), (e, _) in zip(hurt.decoded_states(), plain.decoded_states(), strict=True):
        if len(a) == 1000:
            assert not torch.equal(a[256:512], e[256:512])
            a, e = torch.cat([a[:256], a[512:]]), torch.cat([e[:256], e[512:]])
        assert torch.equal(a, e)
    assert torch.equal(hurt.params[1], plain.params[1])
    same = torch.arange(1000) != 300
    assert torch.equal(hurt.params[0][same], plain.params[0][same])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("method", GENERAL)
def test_any_settings_agree_to_a_rounding(method):
    """A value off by float32's rounding is at most one level off, and seldom."""
    for states in PAIRS[:3]:
        if method == "rmsprop":
            states = states[::-1]
        actual = problem(method, [(20_000,)], "bfloat16 + 16", states, scalars=GENERAL[method])
        expected = actual.copy().specified()
        actual.run()
        values = zip(actual.decoded_states(), expected.decoded_states(), strict=True)
        for (a, code), (e, expected_code) in values:
            rounding = 4e-7 * e.abs().max()
            if code.dtype in (F32, BF16):
                level = 0.0 if code.dtype == F32 else 2.0**-7
                assert ((a - e).abs() <= level * e.abs() + rounding).all()
            else:
                assert (code.int() - expected_code.int()).abs().max() <= 1
            if code.dtype != F32:
                assert (code != expected_code).double().mean() < 1e-3
            assert (a - e).double().mean().abs() < 1e-5 * e.double().abs().mean()
        weights = [formats.join_weight(p.params[0], p.residuals[0]) for p in (actual, expected)]
        error = (weights[0] - weights[1]).double()
        assert error.abs().mean() < 1e-6 * weights[1].double().abs().mean()


# Random numbers


@pytest.mark.parametrize("weight", ["bfloat16 stochastic", "bfloat16 + 8"])
@pytest.mark.parametrize("states", [(BF16, BF16), (S8, E5M3)])
def test_parts_that_know_where_they_begin_have_the_bits_of_the_whole(weight, states):
    whole = problem("adamw", [(2000,)], weight, states)
    parts = whole.copy()
    cut = 768
    for key in ("params", "grads", "residuals"):
        setattr(parts, key, [part for t in getattr(parts, key) for part in (t[:cut], t[cut:])])
    parts.states = [[s[0][:cut], s[0][cut:]] for s in parts.states]
    parts.scales = [[c[0][: cut // 256], c[0][cut // 256 :]] if c else [] for c in parts.scales]
    parts.seeds, parts.firsts, parts.steps = whole.seeds * 2, [0, cut], whole.steps.expand(2)
    whole.run()
    parts.run()
    assert torch.equal(torch.cat(parts.params), whole.params[0])
    for k in range(2):
        assert torch.equal(torch.cat(parts.states[k]), whole.states[k][0])


@pytest.mark.parametrize("change", ["seeds", "firsts", "steps"])
def test_other_seeds_places_and_steps_round_otherwise(change):
    first, second = (problem("rmsprop", [(5000,)], states=(E5M3, BF16)) for _ in range(2))
    if change == "steps":
        second.steps = first.steps + 1
    else:
        setattr(second, change, [getattr(first, change)[0] + 1])
    first.run()
    second.run()
    assert (first.states[0][0] != second.states[0][0]).double().mean() > 0.1
    assert (first.states[1][0] != second.states[1][0]).double().mean() > 0.1
    assert torch.equal(first.params[0], second.params[0])


# Scaling, threads


def test_a_step_with_found_inf_leaves_everything():
    skipped = problem("adamw")
    before = skipped.copy()
    skipped.more = {"found_inf": torch.ones(()), "grad_scale": torch.tensor(4.0)}
    assert_stored_equal(skipped.run(), before)


def test_grad_scale_divides():
    plain = problem("adamw")
    scaled = plain.copy()
    scaled.grads = [4 * g for g in scaled.grads]
    scaled.more = {"found_inf": torch.zeros(()), "grad_scale": torch.tensor(4.0)}
    assert_stored_equal(scaled.run(), plain.run())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("states", PAIRS[:4])
def test_one_thread_and_two_give_the_same_bits(states):
    def result(threads):
        torch.set_num_threads(threads)
        shapes = [(100_003,), (33,), (70_000,), (1023,), (7, 11)]
        return problem("adamw", shapes, states=states, scalars=ADAMW).run()

    assert_stored_equal(result(2), result(1))


# Layouts


@pytest.mark.parametrize("like", [channels_last, transposed, reversed_axes, gapped])
@pytest.mark.parametrize("states", PAIRS[:3])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_strides_change_no_bit(like, states, weight):
    """A block is of elements in the order of the axes, wherever they lie."""
    shapes = [(3, 5, 20, 30), (1, 1, 1, 1), (2, 0, 3, 4), (2, 1, 300, 1)]
    plain = problem("adamw", shapes, weight, states)
    strided = problem("adamw", shapes, weight, states, like=like)
    assert_stored_equal(strided.run(), plain.run())


@pytest.mark.parametrize("key", ["params", "grads", "residuals", "states"])
def test_one_of_the_tensors_may_have_strides_of_its_own(key):
    shapes = [(3, 5, 20, 30)]
    plain = problem("adamw", shapes)
    strided = plain.copy()
    for tensors in strided.states if key == "states" else [getattr(strided, key)]:
        tensors[:] = [channels_last(t) for t in tensors]
    assert_stored_equal(strided.run(), plain.run())


def test_scales_of_any_shape():
    plain = problem("adamw", [(4, 512)])
    shaped = plain.copy()
    shaped.scales = [[scale.view(4, 2) for scale in scales] for scales in shaped.scales]
    plain.run()
    shaped.run()
    for a, e in zip(shaped.scales, plain.scales, strict=True):
        assert torch.equal(a[0].flatten(), e[0])


def test_a_copy_on_write_gradient_stays_shared():
    shared = problem("adamw")
    shared.grads = [torch._lazy_clone(g) for g in shared.grads]
    shared.run()
    assert all(map(torch._C._is_cow_tensor, shared.grads))
