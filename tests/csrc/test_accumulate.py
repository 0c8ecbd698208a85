"""The C++ body of `accumulate_` against the specification."""

from __future__ import annotations

import shutil

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

from rootfree_fused import ops
from rootfree_fused.reference import diag as reference

NAN, INF = float("nan"), float("inf")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64), (F64, F32)]  # of sums, of gradients
PARTS = [None, "squares", "signs"]
SIZES = [0, 1, 7, 33, 1023, 1025, 100_003]
SHAPE = (5, 3, 40, 70)  # 42,000 elements: more than one thread takes
LAYOUTS = [torch.clone, gapped, transposed, channels_last, misaligned, cropped, reversed_axes]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        ops.backends()["cpu"].startswith("reference") and not shutil.which("c++"),
        reason="no extension, and no compiler to build it",
    ),
]


def exact(shape):
    """Numbers of which sums of squares times a small whole number are exact in float32."""
    return torch.randint(-127, 128, shape) / 32


class Problem:
    """Sums and parts of two micro-batches; `like` is called once for each tensor."""

    def __init__(self, part, shapes, dtypes=(F32, F32), like=torch.clone, grad_like=None):
        self.part, (sum_dtype, self.grad_dtype) = part, dtypes
        self.shapes, self.grad_like = shapes, grad_like or like
        self.sums, self.parts = (
            [like(torch.full(shape, NAN, dtype=sum_dtype)) for shape in shapes] for _ in range(2)
        )
        if part is None:
            self.parts = []

    def grads(self, draw):
        return [self.grad_like(draw(shape).to(self.grad_dtype)) for shape in self.shapes]

    def add(self, grads, weight, first):
        settings = {"weight": weight, "signs": self.part == "signs", "first": first}
        torch.ops.rootfree_fused.accumulate_(self.sums, self.parts, grads, **settings)

    def specified(self, all_grads, weights, dtype=None):
        """[sums, parts] by the reference, all in `dtype` where it is given."""
        lists = [[torch.empty_like(t, dtype=dtype) for t in ts] for ts in (self.sums, self.parts)]
        sums, parts = lists
        for j, (grads, weight) in enumerate(zip(all_grads, weights, strict=True)):
            for i, grad in enumerate(grads):
                given = parts[i] if parts else None
                settings = {"weight": weight, "signs": self.part == "signs", "first": j == 0}
                reference.accumulate_(sums[i], given, grad, **settings)
        return lists

    def check(self, weights=(2.0, 3.0)):
        """To the bit where nothing is rounded."""
        all_grads = [self.grads(exact) for _ in weights]
        before = [[g.clone() for g in grads] for grads in all_grads]
        for j, (grads, weight) in enumerate(zip(all_grads, weights, strict=True)):
            self.add(grads, weight, j == 0)
        for actual, expected in zip(
            (self.sums, self.parts), self.specified(all_grads, weights), strict=True
        ):
            assert_bits_equal(actual, expected)
        for grads, old in zip(all_grads, before, strict=True):
            assert_bits_equal(grads, old)

    def tensors(self):
        return [*self.sums, *self.parts]


def test_there_is_a_body():
    operator = "rootfree_fused::accumulate_"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", PARTS)
def test_sizes(part, size):
    Problem(part, [(size,), (100,)]).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_dtypes(part, dtypes):
    Problem(part, [(1,), (33,), (1025,), (), (0, 3)], dtypes).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("part", PARTS)
def test_hundreds_of_tensors(part):
    sizes = torch.randint(0, 3000, (400,)).tolist()
    Problem(part, [(n,) for n in sizes]).check()


@pytest.mark.parametrize("part", PARTS)
def test_mixed_dtypes_and_layouts_in_one_list(part):
    several = [
        Problem(part, [(n,), (5, n)], dtypes, like)
        for n in (1, 100, 2000)
        for dtypes in DTYPES
        for like in (torch.clone, gapped)
    ]
    whole = Problem(part, [])
    whole.sums = [t for p in several for t in p.sums]
    whole.parts = [t for p in several for t in p.parts]
    whole.grads = lambda draw: [g for p in several for g in p.grads(draw)]
    whole.check()


@pytest.mark.parametrize("grad_like", [*LAYOUTS, expanded, expanded_rows])
@pytest.mark.parametrize("like", LAYOUTS)
def test_layouts(like, grad_like):
    for part in PARTS:
        Problem(part, [SHAPE, (2, 1, 3, 1)], like=like, grad_like=grad_like).check()


@pytest.mark.parametrize("like", LAYOUTS)
def test_layouts_of_every_element_size(like):
    for dtypes in DTYPES:
        shapes = [(2, 3, 4, 5), (1, 1, 1, 1), (2, 0, 3, 4), (1, 7, 1, 2)]
        Problem("squares", shapes, dtypes, like).check()


def test_parts_of_another_layout_than_the_sum():
    problem = Problem("squares", [SHAPE], like=channels_last)
    problem.parts = [part.contiguous() for part in problem.parts]
    problem.check()


@pytest.mark.parametrize("part", PARTS)
def test_the_gaps_of_a_strided_sum_are_left_alone(part):
    problem = Problem(part, [(300, 200)], like=gapped)
    problem.check()
    for tensor in problem.tensors():
        gaps = tensor._base[..., 1::2]
        assert torch.equal(gaps, torch.full_like(gaps, 7.0))


def test_a_copy_on_write_gradient_stays_shared():
    grads = [torch._lazy_clone(torch.randn(1000))]
    Problem("squares", [(1000,)]).add(grads, 1.0, first=True)
    assert torch._C._is_cow_tensor(grads[0])


# Numbers


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_any_numbers_are_as_near_to_float64_as_the_reference(part, dtypes):
    problem = Problem(part, [(5000,), (333,)], dtypes)
    weights = [0.3, 1.0, 0.7, 100.0, 3.1, 0.01]
    all_grads = [problem.grads(torch.randn) for _ in weights]
    for j, (grads, weight) in enumerate(zip(all_grads, weights, strict=True)):
        problem.add(grads, weight, j == 0)
    lists = (problem.specified(all_grads, weights, dtype) for dtype in (None, F64))
    for several in zip((problem.sums, problem.parts), *lists, strict=True):
        if several[0]:
            assert_no_worse_than(*map(torch.cat, several))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_is_as_in_the_reference(part):
    problem = Problem(part, [(77,)])
    grads = problem.grads(exact)
    for i, x in enumerate([NAN, INF, -INF, -0.0, 3e38, -1e-30]):
        grads[0][i] = grads[0][-1 - i] = x  # in a vector and in the tail
    for first in (True, False):
        problem.add(grads, 2.0, first)
    expected = problem.specified([grads] * 2, [2.0] * 2)
    for actual, e in zip(problem.tensors(), [t for ts in expected for t in ts], strict=True):
        assert torch.equal(actual.isnan(), e.isnan())
        assert torch.equal(actual.nan_to_num(0, INF, -INF), e.nan_to_num(0, INF, -INF))
        assert (actual[6:-6].isfinite()).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("part", PARTS)
def test_one_thread_and_two_give_the_same_bits(part):
    def result(threads):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        problem = Problem(part, [(100_003,), (33,), (70_000,), (1023,), (7, 11)])
        for j in range(3):
            problem.add(problem.grads(torch.randn), 0.3, j == 0)
        return problem.tensors()

    assert_bits_equal(result(2), result(1))


# Misuse: `ops` names the cure; here memory must stay safe and nothing may be half done


def first_and(second):
    return [torch.rand(4, 8), second]


MISUSE = {
    "a gradient less": ({"grads": [torch.rand(4, 8)]}, "length"),
    "a part less": ({"parts": [torch.rand(4, 8)]}, "length"),
    "a transposed gradient": ({"grads": first_and(torch.rand(8, 4))}, r"sums\[1\].*one shape"),
    "a flat part": ({"parts": first_and(torch.rand(32))}, r"sums\[1\].*one shape"),
    "a double gradient": ({"grads": first_and(torch.rand(4, 8).double())}, r"dtypes of sums\[1\]"),
    "a double part": ({"parts": first_and(torch.rand(4, 8).double())}, r"parts\[1\].*dtype"),
    "a narrow sum": ({"sums": first_and(torch.rand(4, 8).bfloat16())}, r"dtypes of sums\[1\]"),
    "integers": ({"grads": first_and(torch.ones(4, 8, dtype=torch.int32))}, r"dtypes of sums\[1\]"),
    "an expanded sum": ({"sums": first_and(torch.rand(8).expand(4, 8))}, "expanded"),
    "an expanded part": ({"parts": first_and(torch.rand(4, 1).expand(4, 8))}, "expanded"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    arguments = {name: first_and(torch.rand(4, 8)) for name in ("sums", "parts", "grads")}
    changes, message = MISUSE[case]
    arguments |= changes
    before = [t.clone() for tensors in arguments.values() for t in tensors]
    settings = {"weight": 1.0, "signs": False, "first": False}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rootfree_fused.accumulate_(*arguments.values(), **settings)
    after = [t for tensors in arguments.values() for t in tensors]
    assert all(map(torch.equal, after, before))
