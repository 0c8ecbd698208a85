"""The C++ bodies of `pack_` and `unpack_` against the specification, to the bit."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import gapped, reversed_axes, transposed
from helpers.lowbit import BF16, E5M3, F32, FIRSTS, S8, SEEDS, SHAPES, assert_stored_equal

from rootfree_fused.ops import by_reference

NAN, INF = float("nan"), float("inf")
# dtype of what is stored, of what lies beside it, and whether that is one a block.
FORMATS = {
    "bfloat16 + 8": (BF16, torch.int8, False),
    "bfloat16 + 16": (BF16, torch.int16, False),
    "bfloat16 stochastic": (BF16, None, False),
    "S8": (S8, F32, True),
    "E5M3": (E5M3, E5M3, True),
}

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("rootfree_fused::pack_", "CPU"),
        reason="no extension",
    ),
]


class Packing:
    """values, and where they are stored; `like` is called for each tensor but scales."""

    def __init__(self, format, values, like=torch.clone):
        dtype, beside, scaled = FORMATS[format]
        self.values = [like(value) for value in values]
        self.stored = [like(torch.zeros(v.shape, dtype=dtype)) for v in values]
        self.beside = []
        if beside is not None:
            shapes = [(-(-v.numel() // 256),) if scaled else v.shape for v in values]
            others = [torch.zeros(shape, dtype=beside) for shape in shapes]
            self.beside = others if scaled else list(map(like, others))
        count = len(values)
        self.steps = torch.arange(1.0, count + 1)
        self.more = {"seeds": SEEDS[:count], "firsts": FIRSTS[:count], "stream": 2}

    def pack(self, operator=torch.ops.rootfree_fused.pack_):
        operator(self.stored, self.beside, self.values, self.steps, **self.more)
        return self

    def unpack(self, operator=torch.ops.rootfree_fused.unpack_):
        for value in self.values:
            value.fill_(7)
        operator(self.values, self.stored, self.beside)
        return self

    def written(self):
        return [*self.stored, *self.beside, *self.values]

    def copies(self):
        return [t.clone() for t in self.written()]


def drawn():
    torch.manual_seed(0)
    return [torch.randn(shape) * torch.exp2(torch.randint(-9, 9, shape)) for shape in SHAPES]


def agree(format, values, like=torch.clone):
    actual, expected = Packing(format, values, like), Packing(format, values)
    actual.pack()
    expected.pack(by_reference.pack_)
    assert_stored_equal(actual, expected)
    actual.unpack()
    expected.unpack(by_reference.unpack_)
    assert_stored_equal(actual, expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_specified_bits(format):
    agree(format, drawn())
    agree(format, [torch.randn(70_001), torch.empty(0, 3), torch.randn(())])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("like", [transposed, reversed_axes, gapped])
def test_strides_change_no_bit(format, like):
    agree(format, [torch.randn(3, 5, 20, 30), torch.randn(2, 1, 300, 1)], like)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_block(format, value):
    values = [torch.randn(1000)]
    whole = Packing(format, values).pack().unpack().values[0].clone()
    values[0][300] = value
    agree(format, values)
    hurt = Packing(format, values).pack().unpack().values[0]
    assert not hurt[300].isfinite()
    assert torch.equal(torch.cat([hurt[:256], hurt[512:]]), torch.cat([whole[:256], whole[512:]]))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_leaves_what_is_stored(found):
    packing = Packing("S8", drawn())
    before = packing.copies()
    packing.more["found_inf"] = torch.tensor(found)
    packing.pack()
    same = all(map(torch.equal, packing.copies(), before))
    assert same == bool(found)


def test_one_thread_and_two_give_the_same_bits():
    def result(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        packing = Packing("bfloat16 stochastic", [torch.randn(100_003), torch.randn(70_000)])
        return packing.pack().unpack()

    assert_stored_equal(result(2), result(1))


def test_what_is_only_read_stays_shared():
    packing = Packing("bfloat16 + 8", drawn())
    packing.values = [torch._lazy_clone(value) for value in packing.values]
    packing.pack()
    assert all(map(torch._C._is_cow_tensor, packing.values))


MISUSE = {
    "a value less": (lambda p: p.values.pop(), "length"),
    "a residual less": (lambda p: p.beside.pop(), "length"),
    "a seed less": (lambda p: p.more["seeds"].pop(), "seeds and firsts"),
    "a step that is none": (lambda p: p.steps.__setitem__(1, NAN), r"steps\[1\]"),
    "float64 values": (lambda p: p.values.__setitem__(1, p.values[1].double()), "float32"),
    "a flat value": (lambda p: p.values.__setitem__(1, torch.rand(512)), r"stored\[1\].*shape"),
    "no residuals": (lambda p: p.beside.__setitem__(1, torch.zeros(64, 8)), r"stored\[1\] must"),
    "an expanded tensor": (
        lambda p: p.stored.__setitem__(1, torch.zeros(8, dtype=BF16).expand(64, 8)),
        r"stored\[1\].*expanded",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    change, message = MISUSE[case]
    packing = Packing("bfloat16 + 8", [torch.rand(64, 8), torch.rand(64, 8)])
    packing.more = {**packing.more, "seeds": [1, 2], "firsts": [0, 0]}
    change(packing)
    before = packing.copies()
    with pytest.raises(RuntimeError, match=message):
        packing.pack()
    assert all(map(torch.equal, packing.copies(), before))


@pytest.mark.parametrize(
    ("format", "beside"),
    [("S8", []), ("S8", [torch.zeros(1)]), ("E5M3", [torch.zeros(2)]), ("E5M3", [])],
)
def test_scales_that_do_not_fit(format, beside):
    packing = Packing(format, [torch.rand(300)])
    packing.beside = beside
    before = packing.copies()
    for call in (packing.pack, lambda: packing.unpack()):
        with pytest.raises(RuntimeError, match=r"stored\[0\].* scales|scales of stored\[0\]"):
            call()
    assert torch.equal(packing.stored[0], before[0])
