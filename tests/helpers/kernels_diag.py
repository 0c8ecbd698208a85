"""Parameters and state in guarded memory, updated by a launcher and by the specification."""

from __future__ import annotations

import torch
from helpers.comparison import assert_no_worse_than
from helpers.operators import ADAMW, OF_SIGNS, RMSPROP, SIGN

from rootfree_fused.kernels import diag
from rootfree_fused.ops.methods import METHODS
from rootfree_fused.reference import diag as reference

GUARD = 64

# What a launcher is called with: scalars, and whether there are momentum buffers or step counts.
CASES = {
    "rmsprop": (RMSPROP, False),
    "rmsprop momentum": (RMSPROP, True),
    "rmsprop coupled": ({**RMSPROP, "decoupled": False}, False),
    "rmsprop momentum coupled maximize": ({**RMSPROP, "decoupled": False, "maximize": True}, True),
    "adamw": (ADAMW, False),
    "adamw maximize": ({**ADAMW, "maximize": True}, False),
    "adamw bias correction": (ADAMW, True),
    "sign": (SIGN, False),
    "sign maximize": ({**SIGN, "maximize": True}, False),
    "sign of gradients maximize": ({**SIGN, "sign_last": False, "maximize": True}, False),
    "sign of micro-batches": (OF_SIGNS, False),
    "sign of micro-batches maximize": ({**OF_SIGNS, "maximize": True}, False),
}


# Tensors in guarded memory -------------------------------------------------------------------


def contiguous_strides(shape):
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * shape[i + 1]
    return strides


def layout_strides(shape, layout):
    if layout == "transposed":
        return contiguous_strides(shape[::-1])[::-1]
    if layout == "channels_last":
        n, h, w, c = contiguous_strides([shape[0], shape[2], shape[3], shape[1]])
        return [n, c, h, w]
    scale = 2 if layout == "gapped" else 1
    return [scale * stride for stride in contiguous_strides(shape)]


def in_guarded_memory(values, layout="contiguous"):
    """A copy of `values` with this layout, and its memory: 7 wherever there is no element."""
    strides = layout_strides(values.shape, layout)
    offset = GUARD + (layout == "misaligned")
    memory = torch.full((offset + 2 * values.numel() + GUARD,), 7.0).to(values)
    view = memory.as_strided(values.shape, strides, offset)
    view.copy_(values)
    return view, memory


def assert_guards_untouched(view, memory):
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert (memory[outside] == 7).all(), "memory outside the tensor was written"


# One optimizer, three ways -------------------------------------------------------------------


class Lists:
    """Parameters and state of a case, three times.

    The launcher updates `actual`, the eager specification `eager`, in the same dtypes, and the
    specification in float64 `truth`.
    """

    def __init__(self, case, shapes, device, dtypes, layouts=("contiguous",) * 4):
        self.scalars, extra = CASES[case]
        self.is_adamw, self.is_sign = case.startswith("adamw"), case.startswith("sign")
        self.param_dtype, self.grad_dtype = dtypes
        self.device, self.shapes, self.layouts = device, shapes, layouts
        self.steps = None
        if self.is_adamw and extra:
            self.steps = torch.arange(1.0, len(shapes) + 1, device=device)
        params = [torch.randn(shape).to(self.param_dtype) for shape in shapes]
        first = torch.randn if self.is_sign else lambda shape: torch.rand(shape) + 0.5
        square_avgs = [first(shape) for shape in shapes]
        others = [torch.randn(shape) for shape in shapes] if self.is_adamw or extra else []
        start = [[t.to(device) for t in tensors] for tensors in (params, square_avgs, others)]
        where = (layouts[0], *layouts[2:])
        placed = [
            [in_guarded_memory(t, layout) for t in tensors]
            for tensors, layout in zip(start, where, strict=True)
        ]
        self.parts = None
        if "part_weight" in self.scalars:
            counts = [torch.randint(-4, 5, shape).float().to(device) for shape in shapes]
            placed.append([in_guarded_memory(t, layouts[1]) for t in counts])
            self.parts = [view for view, _ in placed[-1]]
        self.placed = [pair for pairs in placed for pair in pairs]
        self.actual = [[view for view, _ in pairs] for pairs in placed[:3]]
        self.eager = [[t.clone() for t in tensors] for tensors in start]
        self.truth = [[t.double() for t in tensors] for tensors in start]

    def fresh_grads(self):
        return [torch.randn(shape).to(self.device, self.grad_dtype) for shape in self.shapes]

    def step(self, grads=None, lr=None):
        lr = torch.tensor(0.3) if lr is None else lr
        grads = self.fresh_grads() if grads is None else grads
        placed = [in_guarded_memory(grad, self.layouts[1]) for grad in grads]
        self.launch([view for view, _ in placed], lr)
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert torch.equal(view.nan_to_num(), grad.nan_to_num()), "the gradient was written"
        self.specify(self.eager, grads, lr)
        self.specify(self.truth, [grad.double() for grad in grads], lr)
        if self.steps is not None:
            self.steps += 1

    def launch(self, grads, lr, **scaling):
        params, square_avgs, others = self.actual
        if self.is_sign:
            more = {**self.scalars, **scaling, "parts": self.parts}
            diag.update_("sign_", params, grads, square_avgs, lr, **more)
        elif self.is_adamw:
            averages = others, square_avgs, self.steps
            diag.update_("adamw_", params, grads, *averages, lr, **self.scalars, **scaling)
        else:
            states = square_avgs, others
            diag.update_("rmsprop_", params, grads, *states, lr, **self.scalars, **scaling)

    def specify(self, lists, grads, lr):
        params, square_avgs, others = lists
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            other = others[i] if others else None
            scalars = {**self.scalars, "lr": lr.double().item()}
            if self.is_sign:
                parts = {} if self.parts is None else {"parts": self.parts[i]}
                METHODS["sign_"].reference(param, grad, square_avgs[i], **scalars, **parts)
            elif self.is_adamw:
                count = None if self.steps is None else self.steps[i]
                reference.adamw_(param, grad, other, square_avgs[i], count, **scalars)
            else:
                reference.rmsprop_(param, grad, square_avgs[i], other, **scalars)

    def check(self, *, one_by_one=False, factor=2.0):
        """Errors are compared over all tensors: over one element the eager error may be luck."""
        for view, memory in self.placed:
            assert_guards_untouched(view, memory)
        for lists in zip(self.actual, self.eager, self.truth, strict=True):
            if one_by_one:
                for actual, eager, truth in zip(*lists, strict=True):
                    assert_no_worse_than(actual, eager, truth, factor=factor)
            elif lists[0]:
                joined = [torch.cat([t.flatten() for t in tensors]) for tensors in lists]
                assert_no_worse_than(*joined, factor=factor)
