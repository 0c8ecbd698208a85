"""Tensors in fewer bytes, in guarded memory, for a launcher and for the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from helpers.kernels_diag import assert_guards_untouched, in_guarded_memory
from helpers.operators import ADAMW, OF_SIGNS, RMSPROP, SIGN, VECTOR_ADAM, for_operators
from triton.runtime import interpreter

from rootfree_fused.kernels import formats, lowbit
from rootfree_fused.ops import by_reference
from rootfree_fused.ops.methods import METHODS
from rootfree_fused.reference.formats import decoded, encoded, join_weight, split_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
S8, E5M3, INT16 = torch.int8, torch.uint8, torch.int16


class Case(NamedTuple):
    """Dtypes of what a call has; averages and second moments are of every method's states."""

    param: torch.dtype
    residual: torch.dtype | None
    average: torch.dtype
    moment: torch.dtype
    stochastic: bool = False


CASES = {
    "bfloat16 + 8, bfloat16": Case(BF16, S8, BF16, BF16),
    "bfloat16 + 8, 8bit": Case(BF16, S8, S8, E5M3),
    "bfloat16 stochastic, 8bit": Case(BF16, None, S8, E5M3, stochastic=True),
    "bfloat16 + 16, bfloat16": Case(BF16, INT16, BF16, BF16),
    "bfloat16 + 16, float32": Case(BF16, INT16, F32, F32),
    "bfloat16 to nearest, 8bit": Case(BF16, None, S8, E5M3),
    "float32, 8bit": Case(F32, None, S8, E5M3),
    "float32, bfloat16": Case(F32, None, BF16, BF16),
    "float16, S8 and float32": Case(F16, None, S8, F32),
}
# By method: settings, and which of its states is a second moment, or None; others are averages.
METHOD_SETTINGS = {
    "adamw_": ({**ADAMW, "bias_correction": True}, 1),
    "rmsprop_": (RMSPROP, 0),
    "rmsprop_ without momentum": ({**RMSPROP, "momentum": 0.0}, 0),
    "sign_": (SIGN, None),
    "sign_ of gradients": ({**SIGN, "sign_last": False, "maximize": True}, None),
    "sign_ of micro-batches": (OF_SIGNS, None),
    "vector_adam_": ({**VECTOR_ADAM, "bias_correction": True}, 1),
}


class Lowbit:
    """Parameters and state of a case, twice: the launcher's `actual` and the `expected` ones.

    Lists: params, a list a state, residuals, scales of each state, as the operators take them.
    """

    def __init__(self, method, case, shapes, device, *, layout="contiguous", grad=None, **settings):
        self.method, self.case = method, CASES[case]
        self.name, self.shapes, self.device, self.layout = method.split()[0], shapes, device, layout
        defaults, moment = METHOD_SETTINGS[method]
        self.settings = {**defaults, **settings}
        self.grad_dtype = grad or self.case.param
        self.steps = torch.arange(1.0, len(shapes) + 1, device=device)
        self.random = {
            "seeds": [2**32 - 1 - 977 * i for i in range(len(shapes))],
            "firsts": [2**33 - 100 + 4000 * i for i in range(len(shapes))],
            "stochastic": self.case.stochastic,
        }
        params = [torch.randn(shape) for shape in shapes]
        residuals = []
        if self.case.residual is not None:
            pairs = [split_weight(p, self.case.residual) for p in params]
            params, residuals = map(list, zip(*pairs, strict=True))
        self.formats = [self.case.average, self.case.moment][:: -1 if moment == 0 else 1]
        del self.formats[len(METHODS[self.name].states) :]
        states = []
        for i, dtype in enumerate(self.formats):
            there = not (i == 1 and method.endswith("without momentum"))
            values = [torch.rand(s) + 0.5 if i == moment else torch.randn(s) for s in shapes]
            states.append([encoded(value, dtype) for value in values] if there else [])
        codes = [[code for code, _ in pairs] for pairs in states]
        scales = [[scale for _, scale in pairs if scale is not None] for pairs in states]
        start = [[p.to(self.case.param) for p in params], *codes, residuals, *scales]
        laid = [layout] * (1 + len(states) + 1) + ["contiguous"] * len(states)
        self.placed = [
            [in_guarded_memory(t.to(device), how) for t in tensors]
            for tensors, how in zip(start, laid, strict=True)
        ]
        self.parts = {}
        if "part_weight" in self.settings:
            self.parts["parts"] = [torch.randint(-4, 5, s).float().to(device) for s in shapes]
        self.actual = [[view for view, _ in pairs] for pairs in self.placed]
        self.expected = [[t.to(device) for t in tensors] for tensors in start]

    def fresh_grads(self):
        """Of at most 8 significant bits, so that their squares are exact."""
        return [
            (torch.randint(-127, 128, shape) / 32).to(self.device, self.grad_dtype)
            for shape in self.shapes
        ]

    def step(self, grads=None, lr=0.0, **scaling):
        grads = self.fresh_grads() if grads is None else grads
        placed = [in_guarded_memory(grad, self.layout) for grad in grads]
        self.launch([view for view, _ in placed], torch.tensor(lr), **scaling)
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert torch.equal(view.nan_to_num(), grad.nan_to_num()), "the gradient was written"
        self.specify(grads, torch.tensor(lr), **scaling)
        self.steps += 1

    def launch(self, grads, lr, **scaling):
        params, *others = self.actual
        tensors = params, grads, *others, self.steps, lr
        more = {**self.parts, **self.random, **self.settings, **scaling}
        lowbit.update_(self.name, *tensors, **more)

    def specify(self, grads, lr, **scaling):
        params, *others = self.expected
        operator = by_reference.lowbit(METHODS[self.name])
        settings = for_operators(self.settings) | self.parts
        operator(params, grads, *others, self.steps, lr, **self.random, **settings, **scaling)

    def check_bits(self):
        """Nothing around the tensors was written, and they are equal but for which NaN it is."""
        self.check_guards()
        for actual, expected in zip(self.actual, self.expected, strict=True):
            for a, e in zip(actual, expected, strict=True):
                assert a.dtype == e.dtype
                assert same(a, e), (a[a != e], e[a != e])

    def check_guards(self):
        for pairs in self.placed:
            for view, memory in pairs:
                assert_guards_untouched(view, memory)

    def weights(self, lists):
        """The parameters of either lists, in float32."""
        params, residuals = lists[0], lists[1 + len(self.formats)]
        if not residuals:
            return [p.float() for p in params]
        return [join_weight(p, r) for p, r in zip(params, residuals, strict=True)]

    def states(self, lists):
        """Of either lists the states of each kind, with their formats, in float32."""
        count = len(self.formats)
        for i, dtype in enumerate(self.formats):
            codes, scales = lists[1 + i], lists[2 + count + i]
            scales = scales or [None] * len(codes)
            yield dtype, [decoded(*pair) for pair in zip(codes, scales, strict=True)]


def same(a, b):
    """Equal, but for which NaN it is, and with the signs of zeros."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.masked_fill(a.isnan(), 0).view(-1).view(torch.uint8),
        b.masked_fill(b.isnan(), 0).view(-1).view(torch.uint8),
    )


# The formats themselves ----------------------------------------------------------------------


def run(kernel, device, *args, **constants):
    """The kernel of a test on blocks of 256: all at once in the interpreter, 4 a program else."""
    rows = args[0].shape[0]
    at_once = rows if device.type == "cpu" else 4
    chosen = interpreter.InterpretedFunction(kernel.fn) if device.type == "cpu" else kernel
    chosen[(rows // at_once,)](*args, BLOCKS=at_once, **constants)


@triton.jit
def hash_kernel(numbers_ptr, seed_ptr, step_ptr, first_ptr, STREAM: tl.constexpr):
    index = tl.arange(0, 8)
    key = formats.key_of(tl.load(seed_ptr), tl.load(step_ptr))
    first = tl.load(first_ptr).to(tl.uint32)
    numbers = formats.random_bits(key, STREAM, first + index.to(tl.uint32))
    tl.store(numbers_ptr + index, numbers.to(tl.int64))


@triton.jit
def state_kernel(
    value_ptr,
    random_ptr,
    code_ptr,
    scale_ptr,
    back_ptr,
    LEFT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """LEFT: how many elements there are, None where the blocks are full."""
    mask = None
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offs = blocks * 256 + tl.arange(0, 256)[None, :]
    value = tl.load(value_ptr + offs)
    random = tl.load(random_ptr + offs).to(tl.uint32)
    if LEFT is not None:
        mask = offs < LEFT
    if code_ptr.dtype.element_ty == tl.int8:
        code, scale = formats.encode_s8(value, random, mask)
    elif code_ptr.dtype.element_ty == tl.uint8:
        code, scale = formats.encode_e5m3(value, random, mask)
    else:
        code, scale = formats.to_bfloat16(value, random), tl.full([BLOCKS, 1], 0.0, tl.float32)
    tl.store(code_ptr + offs, code)
    tl.store(scale_ptr + blocks, scale)
    tl.store(back_ptr + offs, formats.decoded(code, scale))


@triton.jit
def weight_kernel(
    value_ptr, high_ptr, residual_ptr, back_ptr, RESIDUAL: tl.constexpr, BLOCKS: tl.constexpr
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offs = blocks * 256 + tl.arange(0, 256)[None, :]
    high, residual = formats.split_weight(tl.load(value_ptr + offs), RESIDUAL)
    tl.store(high_ptr + offs, high)
    tl.store(residual_ptr + offs, residual)
    tl.store(back_ptr + offs, formats.join_weight(high, residual))


@triton.jit
def join_kernel(high_ptr, residual_ptr, back_ptr, BLOCKS: tl.constexpr):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offs = blocks * 256 + tl.arange(0, 256)[None, :]
    back = formats.join_weight(tl.load(high_ptr + offs), tl.load(residual_ptr + offs))
    tl.store(back_ptr + offs, back)
