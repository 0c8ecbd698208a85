"""Matrices for the tests of root-free Shampoo's Triton launcher, beside eager torch and float64."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from helpers.blocks import as_matrix, structure_for
from helpers.comparison import assert_no_worse_than
from helpers.kernels_diag import assert_guards_untouched, in_guarded_memory
from helpers.tensor_cores import ThreeTF32Products
from helpers.truth import times_identity

from rootfree_fused import reference
from rootfree_fused.kernels import rootfree_shampoo as kernels
from rootfree_fused.ops.axes import bucket_sizes
from rootfree_fused.reference.rootfree_shampoo import balance_rows_, scaled
from rootfree_fused.reference.structures import structure_of

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DENSE, LEFT, RIGHT, NEITHER = (True, True), (True, False), (False, True), (False, False)
LR = 0.05
SCALARS = {
    "beta1": 0.8,
    "beta2": 0.9,
    "damping": 0.1,
    "weight_decay": 0.1,
    "update_rms": 0.4,
    "row_beta": 0.7,
    "maximize": False,
}


def matrix_of(shape):
    return shape[0], math.prod(shape[1:])


class Model:
    """`buckets` are (shape, the structures of the axes as helpers.blocks has them, members)."""

    def __init__(
        self, device, dtype, buckets, param=F32, grad=None, layout="contiguous", **changes
    ):
        self.device, self.dtype, self.layout = torch.device(device), dtype, layout
        self.scalars, self.grad_dtype = {**SCALARS, **changes}, grad or param
        self.placed, self.shapes, self.steps = [], [], []
        lists = ("params", "buffers", "rows", "grams", "factors", "residuals", "products")
        for name in lists:
            setattr(self, name, [])
        for shape, dense, members in buckets:
            self.add_bucket(shape, dense, members, param)
        self.eager, self.truth = self.states(F32), self.states(F64)

    def add_bucket(self, shape, dense, members, param):
        warmed = [warm_state(matrix_of(shape), dense) for _ in range(members)]
        for buffer, rows, _, _ in warmed:
            self.shapes.append(shape)
            self.steps.append(2.0 + len(self.steps))
            self.params.append(self.place(torch.randn(shape).to(param), self.layout))
            self.buffers.append(self.place(buffer.view(shape).float(), self.layout))
            if self.scalars["row_beta"] is not None:
                self.rows.append(self.place(rows.float()))
        for axis, flag in enumerate(dense):
            gram, factor = (
                torch.stack([state[kind][axis] for state in warmed]).float() for kind in (2, 3)
            )
            residual = product = torch.empty(0, device=self.device)
            if flag:
                gram = (gram + gram.mT) / 2
                if self.dtype == BF16:
                    factor, low = reference.split(factor)
                    residual = self.place(low)
                product = self.place(torch.full_like(factor, math.nan))
            self.grams.append(self.place(gram))
            self.factors.append(self.place(factor))
            self.residuals.append(residual)
            self.products.append(product)

    def place(self, values, layout="contiguous"):
        view, memory = in_guarded_memory(values.to(self.device), layout)
        self.placed.append((view, memory))
        return view

    def values(self):
        """The factors as the numbers that they stand for."""
        pairs = zip(self.factors, self.residuals, strict=True)
        return [reference.join(f, r) if r.numel() else f for f, r in pairs]

    def written(self):
        """Everything that a step may write."""
        lists = (self.params, self.buffers, self.rows, self.grams, self.factors)
        return [t for ts in (*lists, self.residuals, self.products) for t in ts if t.numel()]

    def states(self, dtype):
        lists = self.params, self.buffers, self.rows, self.grams, self.values()
        keep = (lambda t: t.double()) if dtype == F64 else torch.clone
        return [[keep(t) for t in tensors] for tensors in lists]

    def fresh_grads(self, scale=0.3):
        return [
            (scale * torch.randn(shape)).to(self.device, self.grad_dtype) for shape in self.shapes
        ]

    def launch(self, grads, *, update=True, refresh=False, lr=LR, steps=None, **scaling):
        state = self.grams, self.factors, self.residuals, self.products
        sizes = bucket_sizes(self.params, self.factors, [2] * (len(self.factors) // 2))
        buckets = kernels.buckets_of(self.params, grads, *state, sizes=sizes)
        assert None not in buckets
        kernels.rootfree_shampoo_(
            buckets,
            self.params,
            grads,
            self.buffers,
            self.rows,
            torch.tensor(self.steps, device=self.device) if steps is None else steps,
            lr if isinstance(lr, torch.Tensor) else torch.tensor(lr, dtype=F64),
            update_factors=update,
            refresh_products=refresh,
            **self.scalars,
            **scaling,
        )

    def step(self, *, update=True, refresh=False, grads=None, lr=LR):
        """One step by the kernels, by eager torch and in float64."""
        grads = grads or self.fresh_grads()
        placed = [in_guarded_memory(grad, self.layout) for grad in grads]
        self.launch([view for view, _ in placed], update=update, refresh=refresh, lr=lr)
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert torch.equal(view.nan_to_num(), grad.nan_to_num()), "the gradient was written"
        with ThreeTF32Products() if self.dtype == F32 else nullcontext():
            self.specify(self.eager, grads, float(lr), update, self.eager_step_)
        self.specify(self.truth, grads, float(lr), update, reference.rootfree_shampoo_)
        self.steps = [step + 1 for step in self.steps]

    def specify(self, states, grads, lr, update, step_):
        params, buffers, rows, grams, factors = states
        first = member = 0
        while member < len(params):
            for i in range(len(factors[first])):
                sizes = matrix_of(self.shapes[member])
                buffer = buffers[member].reshape(sizes)
                grad = grads[member].reshape(sizes)
                step_(
                    params[member],
                    grad.double() if buffer.dtype == F64 else grad,
                    buffer,
                    [gram[i] for gram in grams[first : first + 2]],
                    [factor[i] for factor in factors[first : first + 2]],
                    rows[member] if rows else None,
                    self.steps[member],
                    lr=lr,
                    update_factors=update,
                    **self.scalars,
                )
                buffers[member].copy_(buffer.view(self.shapes[member]))
                member += 1
            first += 2

    def rounded(self, x):
        return x.to(self.dtype).float()

    def product(self, a, b):
        return self.rounded(a) @ self.rounded(b)

    def times(self, x, factor, axis):
        """K^T X on axis 0, X K on axis 1."""
        if factor.dim() == 1:
            return x * (factor.unsqueeze(1) if axis == 0 else factor)
        factor = as_matrix(factor, x.shape[axis])
        return self.product(factor.mT, x) if axis == 0 else self.product(x, factor)

    def eager_step_(
        self, param, grad, buffer, grams, factors, rows, step, *, lr, update_factors, **own
    ):
        """`reference.rootfree_shampoo_` with the kernels' roundings."""
        any_dense = any(factor.dim() > 1 for factor in factors)
        g = scaled(self.rounded(grad) if any_dense else grad.float(), 1.0)
        g = -g if own["maximize"] else g
        buffer.lerp_(g, 1 - own["beta1"])
        update = self.rounded(buffer * own["beta1"] + g * (1 - own["beta1"]))
        if update_factors:
            g = self.rounded(g)
            seen = self.times(g, factors[1], 1), self.times(g, factors[0], 0).mT
            for gram, factor, unfolded in zip(grams, factors, seen, strict=True):
                self.update_root_(gram, factor, self.rounded(unfolded), own)
        for axis, factor in enumerate(factors):
            square = factor.square() if factor.dim() == 1 else self.product(factor, factor.mT)
            update = self.times(update, square, axis)
        if rows is not None:
            update = balance_rows_(update, rows, step, own["row_beta"])
        rms = own["update_rms"] * reference.shape_scale(*update.shape)
        update = scaled(update, rms).reshape(param.shape)
        decay = lr * own["weight_decay"]
        param.copy_(param.float() - decay * param.float() - lr * update)

    def update_root_(self, gram, factor, unfolded, own):
        structure = structure_of(factor)
        gram.lerp_(structure.gram(unfolded) / unfolded.shape[1], 1 - own["beta2"])
        lam = own["damping"] * structure.diagonal(gram).sum() / len(unfolded)
        if factor.dim() == 1:
            factor.copy_((gram + lam).rsqrt())
            return
        damped = self.product(gram, factor) + lam * self.rounded(factor)
        error = self.product(factor.mT, damped)
        structure.add_identity_(error, -1, len(unfolded))
        second = structure.norms(self.product(error, error)).sqrt()
        bound = torch.fmin(structure.norms(error), second)
        factor.sub_(self.product(factor, error) * (0.5 / bound.clamp_min(1)))

    def check(self, factor=3.0):
        """As near to float64 as eager torch, whose sums have another order in six products."""
        for view, memory in self.placed:
            assert_guards_untouched(view, memory)
        actual = self.params, self.buffers, self.rows, self.grams, self.values()
        for tensors, eager, truth in zip(actual, self.eager, self.truth, strict=True):
            for dtype in {t.dtype for t in tensors}:
                joined = (
                    torch.cat(
                        [
                            t.flatten().cpu()
                            for t, a in zip(ts, tensors, strict=True)
                            if a.dtype == dtype
                        ]
                    )
                    for ts in (tensors, eager, truth)
                )
                assert_no_worse_than(*joined, factor=factor)
        for gram in self.grams:
            if gram.dim() > 2:
                assert torch.equal(gram, gram.mT)


def warm_state(sizes, dense):
    """M, the rows' averages, S and K after a few steps of the specification."""
    param, rows = torch.zeros(sizes, dtype=F64), torch.zeros(sizes[0], dtype=F64)
    buffer, grams, factors = torch.zeros(sizes, dtype=F64), [], []
    starts = reference.start_values(SCALARS["damping"])
    for size, flag, values in zip(sizes, dense, starts, strict=True):
        for tensors, value in zip((grams, factors), values, strict=True):
            tensors.append(times_identity(value, structure_for(flag), size, F64))
    spread = torch.linspace(0.1, 2, sizes[1], dtype=F64)  # not all directions alike
    for step in (1, 2, 3):
        grad = torch.randn(sizes, dtype=F64) * spread
        reference.rootfree_shampoo_(
            *(param, grad, buffer, grams, factors, rows, step), **SCALARS, lr=LR
        )
    return buffer, rows, grams, factors
