"""`accumulate_` in Triton against the specification: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_bits_equal, assert_no_worse_than

pytest.importorskip("triton")

from helpers.kernels_diag import assert_guards_untouched, in_guarded_memory
from helpers.offline import on_its_device

from bench.host import as_on_cuda
from rootfree_fused.kernels import accumulate
from rootfree_fused.kernels.diag import BLOCK
from rootfree_fused.reference import diag as reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
PARTS = [None, "squares", "signs"]
SHAPES = [(n,) for n in (0, 1, 33, 1023, BLOCK, BLOCK + 1, 3 * BLOCK + 7)] + [()]

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


def exact(shape):
    """Numbers of which sums of squares times a small whole number are exact in float32."""
    return torch.randint(-127, 128, shape) / 32


class Sums:
    """Sums and parts in guarded memory; layouts: of sums, of gradients, of parts."""

    def __init__(self, part, shapes, device, dtype=F32, layouts=("contiguous",) * 3):
        self.part, self.shapes, self.device, self.dtype = part, shapes, device, dtype
        self.layouts = layouts
        self.placed = [
            [in_guarded_memory(torch.full(s, NAN, device=device), layout) for s in shapes]
            for layout in (layouts[0], layouts[2])
        ]
        self.sums, self.parts = ([view for view, _ in pairs] for pairs in self.placed)
        if part is None:
            self.parts = []
        self.added = []

    def add(self, weight, draw=exact, grads=None):
        if grads is None:
            grads = [draw(shape).to(self.device, self.dtype) for shape in self.shapes]
        placed = [in_guarded_memory(grad, self.layouts[1]) for grad in grads]
        settings = {"signs": self.part == "signs", "first": not self.added}
        views = [view for view, _ in placed]
        accumulate.accumulate_(self.sums, self.parts, views, weight=weight, **settings)
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert_bits_equal([view], [grad])
        self.added.append((grads, weight))

    def specified(self, dtype=F32):
        sums, parts = ([torch.empty_like(t, dtype=dtype) for t in self.sums] for _ in range(2))
        for j, (grads, weight) in enumerate(self.added):
            for i, grad in enumerate(grads):
                given = parts[i] if self.part else None
                settings = {"weight": weight, "signs": self.part == "signs", "first": j == 0}
                reference.accumulate_(sums[i], given, grad, **settings)
        return sums, parts if self.part else []

    def check_bits(self):
        for pairs in self.placed:
            for view, memory in pairs:
                assert_guards_untouched(view, memory)
        for actual, expected in zip((self.sums, self.parts), self.specified(), strict=True):
            assert_bits_equal(actual, expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_sums_are_equal_to_the_bit_where_nothing_is_rounded(part, dtype, device):
    sums = Sums(part, SHAPES, device, dtype)
    for weight in (2.0, 3.0, 1.0):
        sums.add(weight)
    sums.check_bits()


@pytest.mark.parametrize("part", PARTS)
def test_any_numbers_are_as_near_to_float64_as_the_reference(part, device):
    sums = Sums(part, [(2 * BLOCK + 5,), (333,)], device)
    for weight in (0.3, 1.0, 100.0, 0.01):
        sums.add(weight, torch.randn)
    for actual, eager, truth in zip(
        (sums.sums, sums.parts), sums.specified(), sums.specified(F64), strict=True
    ):
        if actual:
            assert_no_worse_than(*map(torch.cat, (actual, eager, truth)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        ((3, 701), ["misaligned"] * 3),
        ((3, 701), ["contiguous", "misaligned", "contiguous"]),
        ((3, 701), ["contiguous", "contiguous", "misaligned"]),
        ((37, 41), ["transposed"] * 3),
        ((37, 41), ["contiguous", "transposed", "contiguous"]),
        ((37, 41), ["transposed", "transposed", "contiguous"]),
        ((2, 5, 13, 17), ["channels_last"] * 3),
        ((2, 5, 13, 17), ["contiguous", "channels_last", "contiguous"]),
        ((37, 41), ["gapped", "contiguous", "contiguous"]),
        ((37, 41), ["gapped"] * 3),
    ],
    ids=str,
)
def test_layouts(shape, layouts, part, device):
    sums = Sums(part, [(5,) * len(shape), shape], device, layouts=layouts)
    for _ in range(2):
        sums.add(2.0)
    sums.check_bits()


def test_an_expanded_gradient(device):
    sums = Sums("squares", [(40, 50)], device)
    grads = [exact((50,)).to(device).expand(40, 50)]
    settings = {"weight": 2.0, "signs": False}
    for first in (True, False):
        accumulate.accumulate_(sums.sums, sums.parts, grads, first=first, **settings)
        sums.added.append((grads, 2.0))
    sums.check_bits()


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_is_as_in_the_reference(part, device):
    sums = Sums(part, [(BLOCK + 9,)], device)
    grad = exact((BLOCK + 9,)).to(device)
    for i, x in enumerate([NAN, INF, -INF, -0.0, 3e38, -1e-30]):
        grad[i] = grad[-1 - i] = x
    for _ in range(2):
        sums.add(2.0, grads=[grad])
    for actual, expected in zip((sums.sums, sums.parts), sums.specified(), strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.nan_to_num(0, INF, -INF), e.nan_to_num(0, INF, -INF))


@pytest.mark.parametrize("part", PARTS)
def test_hundreds_of_tensors_are_one_launch(part, device):
    sums = Sums(part, [(n,) for n in torch.randint(1, 600, (300,)).tolist()], device, BF16)
    for _ in range(2):
        sums.add(2.0)
    sums.check_bits()
    plan = accumulate._find_plan(sums.sums, sums.added[0][0], sums.parts)
    assert len(plan.launches) == 1
    assert plan.copied == []


def test_dtypes_may_mix(device):
    """A launch a dtype of gradients."""
    sums = Sums("squares", [(70,), (1500,), (64,), (300,)], device)
    for _ in range(2):
        grads = [exact(shape).to(device) for shape in sums.shapes]
        dtypes = (F32, BF16, F16, BF16)
        sums.add(2.0, grads=[g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)])
    sums.check_bits()
    assert len(accumulate._find_plan(sums.sums, sums.added[0][0], sums.parts).launches) == 3


def test_gradients_may_come_at_other_addresses_with_and_without_parts(device):
    """No plan of one call is taken for another."""
    memory = [exact((BLOCK + 3,)).to(device) for _ in range(3)]
    for part in (*PARTS, *PARTS):
        sums = Sums(part, [(BLOCK + 3,)], device)
        for grad in memory:
            sums.add(2.0, grads=[grad])
        sums.check_bits()


def test_nothing_to_do(device):
    settings = {"weight": 1.0, "signs": False, "first": True}
    accumulate.accumulate_([], [], [], **settings)
    empty = [torch.empty(0, 3, device=device)]
    accumulate.accumulate_(empty, empty, empty, **settings)


@pytest.mark.parametrize("wrong", [(BF16, BF16, F32), (F64, F64, F64), (F32, F64, F32)], ids=str)
def test_what_the_kernel_does_not_take(wrong, device):
    total, grad, part = (torch.ones(3, dtype=dtype, device=device) for dtype in wrong)
    with pytest.raises(TypeError, match="float32"):
        accumulate.accumulate_([total], [part], [grad], weight=1.0, signs=False, first=True)
    assert (total == 1).all()


@pytest.mark.parametrize("part", PARTS)
def test_the_operator_on_cuda_is_the_launcher(part, device, monkeypatch):
    launched, call_launches = [], accumulate.call_launches

    def noted(kernel, *args):
        launched.append(kernel)
        call_launches(kernel, *args)

    monkeypatch.setattr(accumulate, "call_launches", noted)
    sums = Sums(part, SHAPES, device)
    operator, settings = torch.ops.rootfree_fused.accumulate_, {"signs": part == "signs"}
    grads = [exact(shape).to(device) for shape in SHAPES]
    with as_on_cuda():
        operator(sums.sums, sums.parts, grads, weight=2.0, first=True, **settings)
    assert len(launched) == 1
    sums.added.append((grads, 2.0))
    sums.check_bits()


@pytest.mark.gpu
def test_replays_add_what_gradients_are_then():
    device = torch.device("cuda")
    sums = Sums("squares", [(5,), (BLOCK + 3,)], device)
    sums.add(2.0)
    sources = [g.clone() for g in sums.added[0][0]]
    settings = {"weight": 2.0, "signs": False, "first": False}
    accumulate.accumulate_(sums.sums, sums.parts, sources, **settings)
    sums.added.append(([g.clone() for g in sources], 2.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate.accumulate_(sums.sums, sums.parts, sources, **settings)
    for _ in range(3):
        for source in sources:
            source.copy_(exact(source.shape))
        graph.replay()
        sums.added.append(([g.clone() for g in sources], 2.0))
    sums.check_bits()
