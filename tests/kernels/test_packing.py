"""`pack_` and `unpack_` in Triton, bits as specified: on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels_diag import assert_guards_untouched, in_guarded_memory
from helpers.kernels_lowbit import BF16, E5M3, F16, F32, INT16, S8, same
from helpers.offline import needs_cuda, on_its_device

from bench.host import as_on_cuda
from rootfree_fused.kernels import packing, tables
from rootfree_fused.ops import by_reference, dispatch
from rootfree_fused.reference.formats import BLOCK

SHAPES = [(n,) for n in (1, 255, 256, 257, 0, 3000)]
# Dtypes of what is stored, and of what lies beside it.
CASES = {
    "bfloat16 + 8": (BF16, S8),
    "bfloat16 + 16": (BF16, INT16),
    "bfloat16": (BF16, None),
    "S8": (S8, F32),
    "E5M3": (E5M3, E5M3),
    "float32": (F32, None),
    "float16": (F16, None),
}
EIGHT_BITS = ["S8", "E5M3"]
# All whose bits depend on random numbers, and one whose do not.
ROUNDED = ["bfloat16", "E5M3", "bfloat16 + 8"]

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


class Tensors:
    """Tensors of a case, twice: in guarded memory the launcher's `actual` and the `expected` ones.

    Lists: stored, beside and values.
    """

    def __init__(self, case, shapes, device, layout="contiguous"):
        self.stored, beside = CASES[case]
        self.shapes, self.device = shapes, device
        self.random = {
            "seeds": [2**32 - 1 - 977 * i for i in range(len(shapes))],
            "firsts": [2**33 - 100 + 4000 * i for i in range(len(shapes))],
        }
        self.steps = torch.arange(1.0, len(shapes) + 1, device=device)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        others = [(-(-n // BLOCK),) for n in sizes] if self.stored in (S8, E5M3) else shapes
        start = [
            [torch.ones(shape, dtype=self.stored) for shape in shapes],
            [torch.ones(shape, dtype=beside) for shape in others] if beside is not None else [],
            self.drawn(),
        ]
        laid = [layout, "contiguous" if self.stored in (S8, E5M3) else layout, layout]
        self.placed = [
            [in_guarded_memory(t.to(device), how) for t in ts]
            for ts, how in zip(start, laid, strict=True)
        ]
        self.actual = [[view for view, _ in pairs] for pairs in self.placed]
        self.expected = [[t.to(device) for t in ts] for ts in start]

    def drawn(self):
        """Of many sizes; second moments are not below zero."""
        values = [torch.randn(shape) * 2.0 ** torch.randint(-30, 9, shape) for shape in self.shapes]
        return [v.abs() if self.stored == E5M3 else v for v in values]

    def fill(self, values):
        for tensors in (self.actual[2], self.expected[2]):
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    def pack(self, pack=packing.pack_, stream=1, **settings):
        settings |= {**self.random, "stream": stream}
        pack(*self.actual, self.steps, **settings)
        by_reference.pack_(*self.expected, self.steps, **settings)
        self.check_bits()

    def unpack(self, unpack=packing.unpack_):
        for tensors in (self.actual[2], self.expected[2]):
            for tensor in tensors:
                tensor.fill_(torch.nan)
        for body, (*stored, values) in (
            (unpack, self.actual),
            (by_reference.unpack_, self.expected),
        ):
            body(values, *stored)
        self.check_bits()

    def check_bits(self):
        """Nothing around the tensors was written, and they are equal but for which NaN it is."""
        for pairs in self.placed:
            for view, memory in pairs:
                assert_guards_untouched(view, memory)
        for actual, expected in zip(self.actual, self.expected, strict=True):
            for a, e in zip(actual, expected, strict=True):
                assert same(a, e), (a[a != e], e[a != e])


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_specification(case, stream, device):
    tensors = Tensors(case, SHAPES, device)
    before = [s.clone() for s in tensors.actual[0]]
    tensors.pack(stream=stream)
    assert not any(same(a, b) for a, b in zip(tensors.actual[0], before, strict=True) if len(b) > 1)
    tensors.unpack()
    tensors.pack(stream=stream)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 701), "misaligned"),
        ((37, 41), "transposed"),
        ((2, 5, 13, 17), "channels_last"),
        ((37, 41), "gapped"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["bfloat16 + 8", "bfloat16", *EIGHT_BITS])
def test_blocks_follow_the_order_of_the_axes(case, shape, layout, device):
    tensors = Tensors(case, [shape, shape], device, layout)
    tensors.pack()
    tensors.unpack()


@pytest.mark.parametrize("case", EIGHT_BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_hurts_its_block_alone(bad, case, device):
    tensors = Tensors(case, [(700,), (300,)], device)
    values = tensors.drawn()
    values[0][300] = bad
    tensors.fill(values)
    tensors.pack()
    tensors.unpack()
    hurt, other = (~value.isfinite() for value in tensors.actual[2])
    assert hurt.nonzero().flatten().tolist() == [*range(256, 512)]
    assert not other.any()


@pytest.mark.parametrize("case", ["bfloat16 + 8", "bfloat16 + 16", "bfloat16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_of_a_weight_that_is_not_finite_others_are(bad, case, device):
    tensors = Tensors(case, [(700,)], device)
    (values,) = tensors.drawn()
    values[300] = bad
    tensors.fill([values])
    tensors.pack()
    tensors.unpack()
    assert (~tensors.actual[2][0].isfinite()).nonzero().flatten().tolist() == [300]


@pytest.mark.parametrize("case", ROUNDED)
def test_where_there_were_infs_nothing_is_stored(case, device):
    tensors = Tensors(case, SHAPES, device)
    before = [t.clone() for stored in tensors.actual[:2] for t in stored]
    tensors.pack(found_inf=torch.ones((), device=device))
    assert all(map(same, [t for stored in tensors.actual[:2] for t in stored], before))
    tensors.pack(found_inf=torch.zeros((), device=device))
    assert not same(tensors.actual[0][-1], before[len(SHAPES) - 1])


@pytest.mark.parametrize("case", ROUNDED)
def test_parts_are_stored_as_their_whole(case, device):
    """A part that starts on a block is rounded by the numbers of its place in the whole."""
    tensors = Tensors(case, [(1500,)], device)
    tensors.pack()
    (stored,), beside, (value,) = tensors.actual
    cut = 3 * BLOCK
    for_parts = Tensors(case, [(cut,), (1500 - cut,)], device)
    for_parts.steps = tensors.steps.expand(2)
    first = tensors.random["firsts"][0]
    for_parts.random = {"seeds": 2 * tensors.random["seeds"], "firsts": [first, first + cut]}
    for_parts.fill([value[:cut], value[cut:]])
    for_parts.pack()
    assert same(torch.cat(for_parts.actual[0]), stored)
    assert same(torch.cat(for_parts.actual[1] or [stored]), (beside or [stored])[0])


@pytest.mark.parametrize("case", ROUNDED)
def test_other_steps_are_other_numbers(case, device):
    tensors = Tensors(case, [(3000,)], device)
    found = []
    for place in (device, device, "cpu"):
        tensors.pack()
        found.append(tensors.actual[0][0].clone())
        tensors.steps = (tensors.steps + (len(found) == 1)).to(place)
    assert same(found[0], found[1]) == (case == "bfloat16 + 8")
    assert same(found[1], found[2])


@pytest.mark.parametrize("case", ["bfloat16 + 8", "S8"])
def test_values_may_be_elsewhere_at_each_call(case, device):
    """As where their memory is given back between steps; plans that nobody asks for go."""
    tensors = Tensors(case, SHAPES, device)
    kept = []
    for _ in range(3):
        moved = [in_guarded_memory(value.to(device)) for value in tensors.drawn()]
        kept.append(moved)
        tensors.placed[2] = moved
        tensors.actual[2] = [view for view, _ in moved]
        tensors.expected[2] = [view.clone() for view, _ in moved]
        tensors.pack()
        tensors.unpack()
    assert len(tables._plans) <= tables._MAX_PLANS


def test_many_tensors_are_one_launch(device, monkeypatch):
    plans, call_launches = [], packing.call_launches
    monkeypatch.setattr(
        packing,
        "call_launches",
        lambda kernel, plan, *args: (plans.append(plan), call_launches(kernel, plan, *args)),
    )
    shapes = [(n,) for n in torch.randint(1, 600, (60,)).tolist()]
    tensors = Tensors("E5M3", shapes, device)
    tensors.pack()
    tensors.unpack()
    assert [[launch.programs for launch in plan.launches] for plan in plans] == 2 * [[60]]


def test_no_tensors_are_no_launch():
    packing.unpack_([], [], [])
    packing.pack_([], [], [], torch.ones(0), seeds=[], firsts=[], stream=0)


# The operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bfloat16 + 8", "E5M3"])
def test_the_operators_on_cuda_are_the_launchers(case, device, monkeypatch):
    called, bodies = [], {}
    for name in ("pack_", "unpack_"):
        bodies[name] = getattr(packing, name)

        def noted(*tensors, name=name, **settings):
            called.append(name)
            bodies[name](*tensors, **settings)

        monkeypatch.setattr(packing, name, noted)
    tensors = Tensors(case, SHAPES, device)
    with as_on_cuda():
        tensors.pack(torch.ops.rootfree_fused.pack_)
        tensors.unpack(torch.ops.rootfree_fused.unpack_)
    assert called == ["pack_", "unpack_"]


def test_tensors_on_the_cpu_go_elsewhere(monkeypatch):
    monkeypatch.delattr(packing, "pack_")
    monkeypatch.delattr(packing, "unpack_")
    tensors = Tensors("E5M3", SHAPES, torch.device("cpu"))
    slow = by_reference.pack_, by_reference.unpack_
    on_cuda = map(dispatch._lists_on_cuda, ("pack_", "unpack_"), ("packing",) * 2, slow)
    for run, body in zip((tensors.pack, tensors.unpack), on_cuda, strict=True):
        run(body)


# Only on a GPU -------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("case", ROUNDED)
def test_a_captured_call_counts_on_and_waits_for_nothing(case):
    tensors = Tensors(case, [(5,), (5000,)], torch.device("cuda"))
    settings = {**tensors.random, "stream": 0}
    found, wanted = ([torch.empty_like(v) for v in tensors.actual[2]] for _ in range(2))

    def both():
        packing.pack_(*tensors.actual, tensors.steps, **settings)
        packing.unpack_(found, *tensors.actual[:2])

    def specified():
        by_reference.pack_(*tensors.expected, tensors.steps, **settings)
        by_reference.unpack_(wanted, *tensors.expected[:2])

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
        tensors.steps += 1
    for _ in range(3):
        specified()
        graph.replay()
    tensors.check_bits()
    assert all(map(same, found, wanted))
