"""A model of matrices for the tests of the Triton launcher, updated by it and by two references."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from helpers.blocks import as_factor, as_matrix, structure_for, without_padding
from helpers.comparison import assert_no_worse_than
from helpers.kernels_diag import assert_guards_untouched, in_guarded_memory
from helpers.offline import on_its_device
from helpers.tensor_cores import ThreeTF32Products

from rootfree_fused.kernels import matrix
from rootfree_fused.ops.axes import bucket_sizes
from rootfree_fused.reference import join, split
from rootfree_fused.reference import matrix as reference
from rootfree_fused.reference.structures import structure_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DENSE, LEFT, RIGHT, NEITHER = (True, True), (True, False), (False, True), (False, False)
KERNELS = [name for name in vars(matrix) if name.endswith("_kernel")]

SCALARS = {
    "factor_lr": 0.3,
    "factor_momentum": 0.5,
    "damping": 0.2,
    "batch_size": 4.0,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
}
CASES = {
    "momentum": SCALARS,
    "momentum coupled maximize": {**SCALARS, "decoupled": False, "maximize": True},
    "plain": {**SCALARS, "momentum": 0.0},
    "plain coupled": {**SCALARS, "momentum": 0.0, "decoupled": False},
    "bounded": {**SCALARS, "bound": 0.2},
}
# Parameter shape, the structures of its axes (helpers.blocks), how many. Rows of 8 n are aligned,
# others are ragged; 66 is more than a tile. Blocks of 72 are more than one, and the last of each
# axis is padded.
BUCKETS = [
    ((7, 63), DENSE, 1),
    ((66, 8), DENSE, 1),
    ((24, 40), DENSE, 2),
    ((16, 72), LEFT, 1),
    ((9, 10), LEFT, 1),
    ((66, 8), RIGHT, 1),
    ((11, 7), RIGHT, 1),
    ((8, 70), NEITHER, 1),
    ((66, 24), NEITHER, 1),
    ((40, 24), (16, 8), 2),
    ((100, 9), (72, True), 1),
    ((9, 83), (True, 72), 1),
    ((40, 11), (16, False), 1),
    ((7, 40), (False, 16), 1),
]
FEW = [((7, 9), DENSE, 1), ((24, 16), DENSE, 2), ((9, 16), LEFT, 1), ((8, 7), NEITHER, 1)]


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """What nobody wrote is NaN in every floating dtype."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


# One optimizer, three ways -------------------------------------------------------------------


def squeezed(shape):
    sizes = [d for d in shape if d != 1]
    return sizes[0], math.prod(sizes[1:])


def eager_step(grad, factors, momenta, products, *, update, scalars):
    """The kernels' computation in plain torch: their dtypes, their roundings, their order.

    But for float32's products, which are the caller's to choose.

    Factors are float32 values; returns P. `products` are updated where they are due.
    """
    wide = [f.dim() == 1 for f in factors]
    sizes = grad.shape
    low = next((p.dtype for p in products if p is not None), F32)
    operands = [
        f if d else (split(f)[0] if low == BF16 else f) for f, d in zip(factors, wide, strict=True)
    ]
    g = grad.to(low) if not all(wide) else grad.float()

    def mul(a, b):
        return a.float() @ b.float()

    def along(tensor, operand, axis, keep):
        operand = as_matrix(operand, sizes[axis])
        if operand.dim() == 1:
            return tensor.float() * (operand[:, None] if axis == 0 else operand)
        product = mul(operand.T, tensor) if axis == 0 else mul(tensor, operand)
        return product.to(low) if keep else product

    if update and (grad == 0).all():  # nothing but the products, which nobody has made yet
        refresh_products(factors, products)
    elif update:
        transformed = along(g, operands[0], 0, keep=not wide[1])
        transformed = along(transformed, operands[1], 1, keep=False)
        stored = transformed.to(low)
        traces = [k.float().square().sum() / d for k, d in zip(operands, sizes, strict=True)]
        for axis, (operand, m) in enumerate(zip(operands, momenta, strict=True)):
            others = grad.numel() // grad.shape[axis]
            c1 = scalars["batch_size"] / others
            c2 = scalars["damping"] * traces[1 - axis]
            if wide[axis]:
                h = c1 * transformed.square().sum(1 - axis) + c2 * operand.square() - 1
            else:
                unfolded = stored if axis == 0 else stored.T
                own = as_matrix(operand, sizes[axis])
                h = c1 * mul(unfolded, unfolded.T) + c2 * mul(own.T, own)
                h = as_factor(h - torch.eye(len(own), device=h.device), operand)
            m.copy_(torch.lerp(m.float(), h / 2, 1 - scalars["factor_momentum"]))
        for axis, (factor, operand, m) in enumerate(zip(factors, operands, momenta, strict=True)):
            step = scalars["factor_lr"] / structure_of(m).norms(m.float()).clamp_min(1)
            factor.sub_(step * (factor * m if wide[axis] else mul(operand, m)))
            if not wide[axis]:
                new = split(factor)[0] if low == BF16 else factor
                products[axis].copy_(mul(new, new.mT))
    squares = [f.square() if d else p for f, p, d in zip(factors, products, wide, strict=True)]
    result = along(g, squares[0], 0, keep=not wide[1])
    return along(result, squares[1], 1, keep=False)


class Model:
    """Parameters and state, three times.

    The launcher updates `actual`, plain torch in the same dtypes `eager`, the specification in
    float64 `truth`.
    """

    def __init__(
        self, device, case="momentum", dtype=F32, buckets=BUCKETS, param_dtype=F32, grad_dtype=None,
        layout="contiguous",
    ):  # fmt: skip
        self.scalars, self.dtype, self.buckets, self.device = CASES[case], dtype, buckets, device
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype or param_dtype
        self.layout, self.placed = layout, []
        self.shapes = [shape for shape, _, count in buckets for _ in range(count)]
        self.dense = [dense for _, dense, count in buckets for _ in range(count)]
        params = [torch.randn(shape).to(device, param_dtype) for shape in self.shapes]
        buffers = [torch.randn(shape).to(device) for shape in self.shapes]
        buffers = buffers if self.scalars["momentum"] else []
        self.params = [self.in_guarded_memory(p, layout) for p in params]
        self.buffers = [self.in_guarded_memory(b, layout) for b in buffers]
        self.factors, self.residuals, self.momenta, self.products = [], [], [], []
        for shape, dense, count in buckets:
            for size, flag in zip(squeezed(shape), dense, strict=True):
                self.add_axis(count, size, structure_for(flag))
        self.eager = self.copies(params, buffers, F32)
        self.truth = self.copies(params, buffers, torch.float64)
        self.eager["products"] = [
            [None if not p.numel() else p[i].clone() for p in self.products[2 * b : 2 * b + 2]]
            for b, (_, _, count) in enumerate(buckets)
            for i in range(count)
        ]

    def in_guarded_memory(self, values, layout="contiguous"):
        view, memory = in_guarded_memory(values, layout)
        self.placed.append((view, memory))
        return view

    def add_axis(self, count, size, structure):
        dense, shape = structure.is_dense, (count, *structure.shape(size))
        factor = 0.3 * torch.randn(shape) / (shape[-1] ** 0.5 if dense else 1)
        structure.add_identity_(factor, 1.2, size)
        momentum = torch.randn(shape) / shape[-1]
        if dense:
            factor = without_padding(factor, size)
            momentum = without_padding(momentum + momentum.mT, size).to(self.dtype)
        residual = product = torch.empty(0, device=self.device)
        if dense and self.dtype == BF16:
            factor, residual = split(factor)
            residual = self.in_guarded_memory(residual.to(self.device))
        if dense:
            product = self.in_guarded_memory(torch.full_like(factor, math.nan).to(self.device))
        self.factors.append(self.in_guarded_memory(factor.to(self.device)))
        self.residuals.append(residual)
        self.momenta.append(self.in_guarded_memory(momentum.to(self.device)))
        self.products.append(product)

    def copies(self, params, buffers, dtype):
        keep = {F32: lambda t: t.clone(), torch.float64: lambda t: t.double()}[dtype]
        return {
            "params": [keep(p) for p in params],
            "buffers": [keep(b) for b in buffers],
            "factors": [[keep(t) for t in row] for row in self.rows(self.values())],
            "momenta": [[keep(t) for t in row] for row in self.rows(self.momenta)],
        }

    def values(self):
        """The factors as float32 values."""
        pairs = zip(self.factors, self.residuals, strict=True)
        return [join(f, r) if f.dtype == BF16 else f for f, r in pairs]

    def rows(self, stacks):
        """For each parameter, its tensor of each axis."""
        return [
            [stacks[2 * b][i], stacks[2 * b + 1][i]]
            for b, (_, _, count) in enumerate(self.buckets)
            for i in range(count)
        ]

    def fresh_grads(self):
        return [torch.randn(shape).to(self.device, self.grad_dtype) for shape in self.shapes]

    def launch(self, grads, lr, *, update, refresh=False, **scaling):
        state = self.factors, self.residuals, self.momenta, self.products
        axes = [2] * len(self.buckets)
        sizes = bucket_sizes(self.params, self.factors, axes)
        buckets = matrix.buckets_of(self.params, grads, *state, axes=axes, sizes=sizes)
        assert None not in buckets
        scalars = {**self.scalars, "update_factors": update, "refresh_products": refresh}
        matrix.ifshampoo_(buckets, self.params, grads, self.buffers, lr, **scalars, **scaling)

    def step(self, *, update=True, refresh=False, grads=None, lr=0.1):
        grads = self.fresh_grads() if grads is None else grads
        lr = torch.tensor(lr) if isinstance(lr, float) else lr
        placed = [in_guarded_memory(grad, self.layout) for grad in grads]
        self.launch([view for view, _ in placed], lr, update=update, refresh=refresh)
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert torch.equal(view.nan_to_num(), grad.nan_to_num()), "the gradient was written"
        for kind in ("eager", "truth"):
            self.specify(kind, grads, lr.double().item(), update, refresh)

    def specify(self, kind, grads, lr, update, refresh):
        lists, scalars = getattr(self, kind), self.scalars
        names = ("factor_lr", "factor_momentum", "damping", "batch_size")
        for i, (param, grad) in enumerate(zip(lists["params"], grads, strict=True)):
            factors, momenta = lists["factors"][i], lists["momenta"][i]
            g = grad.reshape(squeezed(grad.shape))
            if kind == "truth":
                g = g.double()
                if update:
                    chosen = {name: scalars[name] for name in names}
                    reference.update_factors_(g, factors, momenta, **chosen)
                update_ = reference.precondition(g, factors)
            else:
                products = lists["products"][i]
                with ThreeTF32Products() if self.dtype == F32 else nullcontext():
                    if refresh:
                        refresh_products(factors, products)
                    update_ = eager_step(
                        g, factors, momenta, products, update=update, scalars=scalars
                    )
            reference.apply_(
                param,
                (-update_ if scalars["maximize"] else update_).reshape(param.shape),
                lists["buffers"][i] if lists["buffers"] else None,
                lr=lr,
                **{name: scalars[name] for name in ("momentum", "weight_decay", "decoupled")},
                bound=scalars.get("bound", math.inf),
            )

    def check(self, factor=2.0):
        """Scales every tensor to 1 by a power of 2 and compares errors over all of a kind."""
        for view, memory in self.placed:
            assert_guards_untouched(view, memory)
        actual = {
            "params": self.params,
            "buffers": self.buffers,
            "factors": [t for row in self.rows(self.values()) for t in row],
            "momenta": [t for row in self.rows(self.momenta) for t in row],
        }
        for key, tensors in actual.items():
            eager, truth = self.eager[key], self.truth[key]
            if key in ("factors", "momenta"):
                eager, truth = ([t for row in rows for t in row] for rows in (eager, truth))
            for dtype in {t.dtype for t in tensors}:
                rows = [
                    row for row in zip(tensors, eager, truth, strict=True) if row[0].dtype == dtype
                ]
                scales = [0.5 ** truth.abs().max().log2().ceil() for _, _, truth in rows]
                joined = [
                    torch.cat(
                        [
                            (row[n] * s.to(row[n])).flatten()
                            for row, s in zip(rows, scales, strict=True)
                        ]
                    )
                    for n in range(3)
                ]
                assert_no_worse_than(*joined, factor=factor)


def refresh_products(factors, products):
    for factor, product in zip(factors, products, strict=True):
        if product is not None:
            new = split(factor)[0].float() if product.dtype == BF16 else factor
            product.copy_(new @ new.mT)
