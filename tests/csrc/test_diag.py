"""The C++ bodies of the diagonal updates against the specification in float64."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from helpers.comparison import assert_bits_equal, assert_no_worse_than
from helpers.layouts import (
    channels_last,
    cropped,
    expanded,
    expanded_rows,
    gapped,
    misaligned,
    reversed_axes,
    transposed,
)
from helpers.operators import ADAMW, OF_SIGNS, RMSPROP, SIGN, for_operators

from rootfree_fused import ops
from rootfree_fused.ops.methods import METHODS
from rootfree_fused.reference import diag as reference

NAN, INF = float("nan"), float("inf")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64), (F64, F32)]
SIZES = [0, 1, 7, 31, 33, 1023, 1025, 100003]

# name: (operator, scalars, states, whether steps are given)
UPDATES = {
    "rmsprop": ("rmsprop_", RMSPROP, 2, False),
    "rmsprop without buffer": ("rmsprop_", {**RMSPROP, "momentum": 0.0}, 1, False),
    "rmsprop as released": ("rmsprop_", {**RMSPROP, "decoupled": False}, 2, False),
    "rmsprop as released, no buffer": ("rmsprop_", {**RMSPROP, "decoupled": False}, 1, False),
    "rmsprop ascending": ("rmsprop_", {**RMSPROP, "maximize": True}, 2, False),
    "rmsprop, s is the last gradient": ("rmsprop_", {**RMSPROP, "alpha": 0.0}, 2, False),
    "rmsprop, s is forgotten soon": ("rmsprop_", {**RMSPROP, "alpha": 0.3}, 2, False),
    "rmsprop, s stays 1": ("rmsprop_", {**RMSPROP, "alpha": 1.0}, 2, False),
    "adamw": ("adamw_", ADAMW, 2, False),
    "adamw corrected": ("adamw_", ADAMW, 2, True),
    "adamw ascending": ("adamw_", {**ADAMW, "maximize": True}, 2, True),
    "adamw, m is the last gradient": ("adamw_", {**ADAMW, "beta1": 0.0, "beta2": 0.0}, 2, True),
    "sign": ("sign_", SIGN, 1, False),
    "sign ascending": ("sign_", {**SIGN, "maximize": True}, 1, False),
    "sign of gradients": ("sign_", {**SIGN, "sign_last": False}, 1, False),
    "signs of micro-batches": ("sign_", OF_SIGNS, 1, False),
    "signs of micro-batches, ascending": ("sign_", {**OF_SIGNS, "maximize": True}, 1, False),
}
MAIN_UPDATES = ["rmsprop", "rmsprop without buffer", "adamw corrected", "signs of micro-batches"]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        ops.backends()["cpu"].startswith("reference") and not shutil.which("c++"),
        reason="no extension, and no compiler to build it",
    ),
]


class Problem:
    """Lists for one update; `like` is called once for each parameter, gradient and state."""

    def __init__(self, update, shapes, dtypes=(F32, F32), param_like=None, grad_like=None):
        self.name, self.scalars, states, has_steps = UPDATES[update]
        param_dtype, grad_dtype = dtypes
        state_dtype = F64 if param_dtype == F64 else F32
        param_like = param_like or torch.clone
        grad_like = grad_like or param_like
        self.params = [param_like(torch.randn(shape).to(param_dtype)) for shape in shapes]
        self.grads = [grad_like(torch.randn(shape).to(grad_dtype)) for shape in shapes]
        self.states = [
            [param_like(torch.rand(shape).to(state_dtype)) for shape in shapes]
            for _ in range(states)
        ]
        self.steps = torch.arange(1.0, len(shapes) + 1) if has_steps else None
        self.parts = None
        if "part_weight" in self.scalars:
            self.parts = [
                param_like(torch.randint(-4, 5, shape).to(state_dtype)) for shape in shapes
            ]

    def run(self, steps=1):
        """The C++ body, in place."""
        for _ in range(steps):
            lists = self.params, self.grads, self.states
            call(self.name, *lists, self.steps, self.scalars, parts=self.parts)

    def expected(self, dtype=None):
        """[params, states...] after one step of the reference; all in `dtype` where it is given."""
        clones = [
            [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]
            for tensors in (self.params, *self.states)
        ]
        grads = self.grads if dtype is None else [g.to(dtype) for g in self.grads]
        for i, grad in enumerate(grads):
            operands = [tensors[i] for tensors in clones]
            if self.name == "rmsprop_":
                param, s, *buffer = operands
                reference.rmsprop_(param, grad, s, *(buffer or [None]), lr=0.5, **self.scalars)
            elif self.name == "sign_":
                parts = {} if self.parts is None else {"parts": self.parts[i]}
                run = METHODS[self.name].reference
                run(operands[0], grad, operands[1], lr=0.5, **self.scalars, **parts)
            else:
                step = None if self.steps is None else self.steps[i]
                reference.adamw_(operands[0], grad, *operands[1:], step, lr=0.5, **self.scalars)
        return clones

    def check(self):
        """One step is as near to float64 as the reference, and leaves the gradients alone."""
        eager, truth = self.expected(), self.expected(F64)
        grads = [g.clone() for g in self.grads]
        self.run()
        for group in zip((self.params, *self.states), eager, truth, strict=True):
            for dtype in {t.dtype for t in group[0]}:
                # Together: one element alone may cancel, and its relative error then says nothing.
                same = [i for i, t in enumerate(group[0]) if t.dtype == dtype]
                assert_no_worse_than(*(torch.cat([g[i].flatten() for i in same]) for g in group))
        assert_bits_equal(self.grads, grads)

    def tensors(self):
        return [t for tensors in (self.params, *self.states) for t in tensors]


def call(name, params, grads, states, steps, scalars, lr=0.5, parts=None):
    lr, scalars = torch.tensor(lr, dtype=F64), for_operators(scalars)
    with torch.no_grad():
        if name == "rmsprop_":
            buffers = states[1] if len(states) == 2 else []
            torch.ops.rootfree_fused.rmsprop_(params, grads, states[0], buffers, lr, **scalars)
        elif name == "sign_":
            torch.ops.rootfree_fused.sign_(params, grads, *states, lr, **scalars, parts=parts)
        else:
            torch.ops.rootfree_fused.adamw_(params, grads, *states, steps, lr, **scalars)


def test_the_extension_runs():
    assert ops.backends()["cpu"].startswith("C++ (")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("update", UPDATES)
def test_sizes(update, size):
    Problem(update, [(size,), (100,)]).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_dtypes(update, dtypes):
    Problem(update, [(1,), (33,), (1025,), ()], dtypes).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_hundreds_of_tensors(update):
    sizes = torch.randint(0, 3000, (400,)).tolist()
    Problem(update, [(n,) for n in sizes]).check()


@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_mixed_dtypes_and_layouts_in_one_list(update):
    parts = [
        Problem(update, [(n,), (5, n)], dtypes, param_like=like)
        for n in (1, 100, 2000)
        for dtypes in DTYPES
        for like in (torch.clone, gapped)
    ]
    whole = Problem(update, [])
    whole.params = [p for part in parts for p in part.params]
    whole.grads = [g for part in parts for g in part.grads]
    whole.states = [
        [s for part in parts for s in part.states[k]] for k in range(len(parts[0].states))
    ]
    if whole.parts is not None:
        whole.parts = [t for part in parts for t in part.parts]
    if whole.steps is not None:
        whole.steps = torch.arange(1.0, len(whole.params) + 1)
    whole.check()


# Layouts


SHAPE = (5, 3, 40, 70)  # 42,000 elements: more than one thread takes
LAYOUTS = [torch.clone, gapped, transposed, channels_last, misaligned, cropped, reversed_axes]


@pytest.mark.parametrize("grad_like", [*LAYOUTS, expanded, expanded_rows])
@pytest.mark.parametrize("param_like", LAYOUTS)
def test_layouts(param_like, grad_like):
    for update in MAIN_UPDATES:
        Problem(update, [SHAPE], param_like=param_like, grad_like=grad_like).check()


@pytest.mark.parametrize("like", LAYOUTS)
def test_layouts_of_every_element_size(like):
    for dtypes in DTYPES:
        shapes = [(2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 3, 1), (2, 0, 3, 4), (1, 7, 1, 2)]
        Problem("rmsprop", shapes, dtypes, param_like=like).check()


@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_states_of_another_layout_than_the_parameter(update):
    problem = Problem(update, [SHAPE], param_like=channels_last)
    problem.states = [[s.contiguous() for s in states] for states in problem.states]
    problem.check()


@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_the_gradient_of_a_sum(update):
    problem = Problem(update, [(40, 1000)])
    param = problem.params[0].clone().requires_grad_()
    problem.grads = list(torch.autograd.grad(param.sum(), param))
    assert problem.grads[0].stride() == (0, 0)
    problem.check()


@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_the_gaps_of_a_strided_parameter_are_left_alone(update):
    problem = Problem(update, [(300, 200)], param_like=gapped)
    problem.run()
    for tensor in problem.tensors():
        gaps = tensor._base[..., 1::2]
        assert torch.equal(gaps, torch.full_like(gaps, 7.0))


def test_a_copy_on_write_gradient_stays_shared():
    problem = Problem("rmsprop", [(1000,)])
    problem.grads = [torch._lazy_clone(g) for g in problem.grads]
    problem.run()
    assert torch._C._is_cow_tensor(problem.grads[0])


# Numbers


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_number_is_read_exactly(dtype):
    """A step with lr = 0 leaves the parameter, one with beta1 = 0 leaves the gradient in m."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isinf()]
    param, zeros, m, s = every.clone(), torch.zeros_like(every), *torch.ones(2, len(every))
    scalars = {**ADAMW, "beta1": 0.0, "weight_decay": 0.0}
    call("adamw_", [param], [zeros], [[m], [s]], None, scalars, lr=0.0)
    call("adamw_", [zeros], [every], [[m], [s]], None, scalars)
    for actual in (param, m):
        assert torch.equal(actual.isnan(), every.isnan())
        assert torch.equal(actual.nan_to_num(), every.to(actual.dtype).nan_to_num())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_parameters_are_rounded_once_to_nearest_even(dtype):
    """p = 0 - 1 * buf for buf of every exponent, near-ties and ties, beyond the largest number."""
    bits = torch.randint(-(2**31), 2**31 - 1, (50_001,), dtype=torch.int32)
    ties = torch.randn(50_000).to(dtype).float()
    ties = (ties + ties.to(dtype).nextafter(torch.tensor(INF, dtype=dtype)).float()) / 2
    near = torch.nextafter(ties, torch.tensor(INF))
    x = torch.cat(
        [bits.view(F32), ties, near, torch.tensor([0.0, INF, -INF, NAN, 65519.9, 65520.0])]
    )
    params, grads = [torch.zeros(len(x), dtype=dtype)], [torch.zeros(len(x))]
    scalars = {**RMSPROP, "momentum": 1.0, "weight_decay": 0.0}
    call("rmsprop_", params, grads, [[torch.ones(len(x))], [x]], None, scalars, lr=1.0)
    expected = (-x).to(dtype)
    assert torch.equal(params[0].isnan(), expected.isnan())
    assert torch.equal(params[0].nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("isa")
def test_a_thousand_small_steps_do_not_drift():
    """s moves by 1e-4 of its distance a step; alpha itself rounded to float32 would bias it."""
    scalars = {**RMSPROP, "alpha": 1 - 1e-4}
    actual, eager, truth = (torch.ones(1000, dtype=dtype) for dtype in (F32, F32, F64))
    for _ in range(1000):
        p, g = torch.randn(2, 1000)
        call("rmsprop_", [p.clone()], [g], [[actual]], None, scalars)
        for s in (eager, truth):
            reference.rmsprop_(p.clone(), g, s, None, lr=0.5, **scalars)
    assert_no_worse_than(actual, eager, truth)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("update", UPDATES)
def test_nan_and_infinity_propagate_as_in_the_reference(update):
    problem = Problem(update, [(77,)])
    for i, x in enumerate([NAN, INF, -INF]):
        for tensors in (problem.grads, problem.parts or []):
            for tensor in tensors:
                tensor[i] = tensor[-1 - i] = x  # in a vector and in the tail
    expected = problem.expected()
    problem.run()
    for actual, e in zip((problem.params, *problem.states), expected, strict=True):
        # torch.lerp makes NaN of infinity for weights above 1/2; here it stays infinity.
        assert torch.equal(actual[0].isfinite(), e[0].isfinite())
        assert not (actual[0].isnan() & ~e[0].isnan()).any()
        assert actual[0].isfinite().sum() >= 71


def test_lr_is_read_in_its_own_precision():
    for lr in (torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=F32)):
        p, g, s = (torch.ones(3, dtype=F64) for _ in range(3))
        scalars = {**RMSPROP, "alpha": 1.0, "damping": 0.0, "weight_decay": 0.0}
        torch.ops.rootfree_fused.rmsprop_([p], [g], [s], [], lr, **for_operators(scalars))
        assert torch.equal(p, torch.full_like(p, 1 - lr.item()))


def test_steps_may_be_expanded():
    problem = Problem("adamw corrected", [(5,), (6,)])
    problem.steps = torch.tensor([3.0]).expand(2)
    problem.check()


# Threads


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("update", MAIN_UPDATES)
def test_one_thread_and_two_give_the_same_bits(update):
    def result(threads):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        problem = Problem(update, [(100_003,), (33,), (70_000,), (1023,), (7, 11)])
        problem.run(steps=3)
        return problem.tensors()

    assert_bits_equal(result(2), result(1))


def test_two_python_threads_do_not_disturb_each_other():
    problems = [Problem("adamw corrected", [(50_000,), (100,)]) for _ in range(2)]
    expected = [Problem("adamw corrected", []) for _ in range(2)]
    for problem, twin in zip(problems, expected, strict=True):
        twin.params, twin.grads, twin.steps = (
            list(map(torch.clone, problem.params)),
            problem.grads,
            problem.steps,
        )
        twin.states = [list(map(torch.clone, states)) for states in problem.states]
        twin.run(steps=30)
    threads = [threading.Thread(target=problem.run, args=(30,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem, twin in zip(problems, expected, strict=True):
        assert_bits_equal(problem.tensors(), twin.tensors())


# Misuse: `ops` names the cure; here memory must stay safe and nothing may be half done


def first_and(second):
    return [torch.rand(4, 8), second]


MISUSE = {
    "a gradient less": ({"grads": [torch.rand(4, 8)]}, "length"),
    "a state less": ({"s": [torch.rand(4, 8)]}, "length"),
    "no second state": ({"m": []}, "length"),
    "a transposed gradient": ({"grads": first_and(torch.rand(8, 4))}, r"params\[1\].*one shape"),
    "a flat state": ({"s": first_and(torch.rand(32))}, r"params\[1\].*one shape"),
    "a longer gradient": ({"grads": first_and(torch.rand(4, 9))}, r"params\[1\].*one shape"),
    "a double gradient": (
        {"grads": first_and(torch.rand(4, 8, dtype=F64))},
        r"dtypes.*params\[1\]",
    ),
    "states of two dtypes": ({"s": first_and(torch.rand(4, 8, dtype=F64))}, r"params\[1\] differ"),
    "an expanded parameter": ({"params": first_and(torch.rand(8).expand(4, 8))}, "expanded"),
    "an expanded state": ({"s": first_and(torch.rand(4, 1).expand(4, 8))}, "expanded"),
    "integer parameters": ({"params": first_and(torch.ones(4, 8, dtype=torch.int32))}, "dtypes"),
    "a step too few": ({"steps": torch.ones(1)}, "steps"),
    "integer steps": ({"steps": torch.ones(2, dtype=torch.int64)}, "steps"),
    "an integer lr": ({"lr": torch.tensor(1)}, "lr"),
    "two lrs": ({"lr": torch.tensor([1.0, 2.0])}, "lr"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    names = ("params", "grads", "m", "s")
    arguments = {name: first_and(torch.rand(4, 8)) for name in names}
    arguments |= {"steps": torch.ones(2), "lr": torch.tensor(0.5)}
    changes, message = MISUSE[case]
    arguments |= changes
    before = {name: [t.clone() for t in arguments[name]] for name in names}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rootfree_fused.adamw_(*arguments.values(), **for_operators(ADAMW))
    for name in names:
        for tensor, old in zip(arguments[name], before[name], strict=True):
            assert torch.equal(tensor, old)
