"""One call of IF-Shampoo's operator on the CPU, beside plain torch and float64.

With bfloat16 factors the eager computation is plain torch with the same roundings: operands and
the results of chained products in bfloat16, sums in float32.
"""

from __future__ import annotations

import torch
from helpers.blocks import structure_for
from helpers.comparison import assert_bits_equal, assert_no_worse_than

from rootfree_fused import reference
from rootfree_fused.reference import matrix
from rootfree_fused.reference.structures import structure_of

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
SCALARS = {
    "factor_lr": 0.3,
    "factor_momentum": 0.4,
    "damping": 0.1,
    "batch_size": 8.0,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
}
MODES = {
    "decoupled": {},
    "as released": {"decoupled": False},
    "ascending": {"maximize": True},
    "without momentum": {"momentum": 0.0},
    "without momentum, as released": {"momentum": 0.0, "decoupled": False},
}
DENSE, DIAGONAL = (True, True), (False, False)
RAGGED = [(2, 3), (1, 65), (7, 63), (63, 65), (64, 64), (65, 7), (128, 33), (130, 66), (20, 600)]


class Problem:
    """One call of the operator: `buckets` are (sizes, axes, members, cached axes).

    Of the axes see helpers/blocks.py.
    """

    def __init__(self, buckets, dtype=BF16, param=F32, grad=None, like=torch.clone, **changes):
        self.dtype, self.scalars = dtype, {**SCALARS, **changes}
        wide = F64 if param == F64 else F32
        self.params, self.grads, self.buffers = [], [], []
        self.factors, self.residuals, self.momenta, self.products = [], [], [], []
        self.sizes, self.axes = [], []
        for sizes, dense, members, cached in buckets:
            self.axes.append(len(sizes))
            self.sizes += [sizes] * members
            for _ in range(members):
                self.params.append(like(torch.randn(sizes).to(param)))
                self.grads.append(like((0.3 * torch.randn(sizes)).to(grad or param)))
                if self.scalars["momentum"]:
                    self.buffers.append(like(torch.randn(sizes).to(wide)))
            for d, flag, is_cached in zip(sizes, dense, cached, strict=True):
                self._add_axis(members, d, structure_for(flag), is_cached)

    def _add_axis(self, members, d, structure, cached):
        """A factor near the identity and a symmetric momentum."""
        empty, dense = torch.empty(0), structure.is_dense
        if dense:
            factor = torch.eye(d, dtype=F64) + 0.3 * torch.randn(members, d, d, dtype=F64) / d**0.5
            momentum = torch.randn(members, d, d, dtype=F64) / d
            momentum = structure.from_matrix((momentum + momentum.mT).to(self.dtype))
            factor = structure.from_matrix(factor)
        else:
            factor = 1 + 0.3 * torch.randn(members, d, dtype=F64)
            momentum = torch.randn(members, d, dtype=F64).to(F64 if self.dtype == F64 else F32) / d
        residual = empty
        if dense and self.dtype == BF16:
            factor, residual = matrix.split(factor.float())
        elif not dense and self.dtype == BF16:
            factor = factor.float()
        else:
            factor = factor.to(self.dtype)
        self.factors.append(factor)
        self.residuals.append(residual)
        self.momenta.append(momentum)
        # Poisoned: an update writes it before anything reads it.
        self.products.append(torch.full_like(factor, NAN) if dense and cached else empty)

    def run(self, update=True, refresh=False, lr=0.05):
        torch.ops.rootfree_fused.ifshampoo_(
            self.params,
            self.grads,
            self.factors,
            self.residuals,
            self.momenta,
            self.products,
            self.buffers,
            torch.tensor(lr, dtype=F64),
            axes=self.axes,
            update_factors=update,
            refresh_products=refresh,
            **self.scalars,
        )

    def joined(self):
        """The factors of every axis, as the numbers that they stand for."""
        pairs = zip(self.factors, self.residuals, strict=True)
        return [matrix.join(f, r) if r.numel() else f for f, r in pairs]

    def outcome(self):
        return [self.params, self.buffers, self.joined(), self.momenta]

    def tensors(self):
        lists = (self.params, self.buffers, self.factors, self.residuals, self.momenta)
        return [t for tensors in (*lists, self.products) for t in tensors]

    def expected(self, exact, updates):
        """The outcome of steps, each of which updates the factors or does not.

        By the reference in float64 (exact), or by eager torch with the operator's roundings.
        """
        state = [[t.clone() for t in ts] for ts in self.outcome()]
        if exact:
            state = [[t.to(F64) for t in ts] for ts in state]
        params, buffers, factors, momenta = state
        scalars = dict(self.scalars)
        factor_scalars = {
            k: scalars.pop(k) for k in ("factor_lr", "factor_momentum", "damping", "batch_size")
        }
        maximize = scalars.pop("maximize")
        axis = member = 0
        for count in self.axes:
            for i in range(len(factors[axis])):
                grad = self.grads[member].reshape(self.sizes[member])
                mine = [f[i] for f in factors[axis : axis + count]]
                kept = [m[i] for m in momenta[axis : axis + count]]
                for update in updates:
                    if exact:
                        g = grad.to(F64)
                        if update:
                            reference.update_factors_(g, mine, kept, **factor_scalars)
                        step = reference.precondition(g, mine)
                    else:
                        g = grad.to(self.dtype)
                        if update:
                            eager_update_(g, mine, kept, self.dtype, **factor_scalars)
                        step = eager_precondition(g, mine, self.dtype)
                    reference.apply_(
                        params[member],
                        (-step if maximize else step).reshape(params[member].shape),
                        buffers[member] if buffers else None,
                        lr=0.05,
                        **scalars,
                    )
                member += 1
            axis += count
        return params, buffers, factors, momenta

    def check(self, updates=(True,), factor=2.0):
        if self.dtype == BF16 and not torch.ops.rootfree_fused._bf16_kernel_runs():
            factor *= 2  # oneDNN rounds every product to bfloat16, the kernel only what is stored
        eager, truth = self.expected(False, updates), self.expected(True, updates)
        grads = [g.clone() for g in self.grads]
        for update in updates:
            self.run(update)
        for actual, e, t in zip(self.outcome(), eager, truth, strict=True):
            for a, b, c in zip(actual, e, t, strict=True):
                assert_no_worse_than(a, b, c, factor=factor)
        assert_bits_equal(self.grads, grads)


def eager_product(x, factor, axis, dtype):
    """F^T X on axis 0 or X F on axis 1, rounded to the dtype of the products."""
    structure, read = structure_of(factor), factor_read(factor, dtype)
    if factor.dim() > 1:
        x = x.to(wide_of(dtype))
    if axis == 0:
        return structure.left(read, x, transposed=True).to(dtype)
    return structure.right(x, read).to(dtype)


def wide_of(dtype):
    return F64 if dtype == F64 else F32


def factor_read(factor, dtype):
    return factor.to(dtype).to(wide_of(dtype)) if factor.dim() > 1 else factor


def eager_update_(grad, factors, momenta, dtype, **scalars):
    wide = wide_of(dtype)
    transformed = eager_product(eager_product(grad, factors[0], 0, dtype), factors[1], 1, dtype)
    values = [factor.clone() for factor in factors]
    for axis, (factor, m) in enumerate(zip(factors, momenta, strict=True)):
        structure, read = structure_of(factor), factor_read(factor, dtype)
        unfolded = (transformed.T if axis else transformed).to(wide)
        trace = values[1 - axis].square().sum() / unfolded.shape[1]
        target = scalars["batch_size"] / unfolded.shape[1] * structure.gram(unfolded)
        target += scalars["damping"] * trace * structure.square(read)
        structure.add_identity_(target, -1, len(unfolded))
        new = m.to(wide).lerp(target / 2, 1 - scalars["factor_momentum"])
        m.copy_(new)
        step = scalars["factor_lr"] / structure.norms(new).clamp_min(1)
        values[axis] = factor - step * structure.product(read, m.to(wide))
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


def eager_precondition(grad, factors, dtype):
    for axis, factor in enumerate(factors):
        square = factor.square()
        if factor.dim() > 1:
            read = factor_read(factor, dtype)
            square = (read @ read.mT).to(dtype)
        grad = eager_product(grad, square, axis, dtype)
    return grad.to(wide_of(dtype))
