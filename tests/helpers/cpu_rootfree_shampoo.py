"""One call of root-free Shampoo's operator on the CPU, beside plain torch and float64.

The eager computation is plain torch with the kernel's roundings: operands in bfloat16, sums in
float32.
"""

from __future__ import annotations

import functools

import torch
from helpers.blocks import structure_for
from helpers.comparison import assert_bits_equal, assert_no_worse_than

from rootfree_fused import reference
from rootfree_fused.reference import matrix
from rootfree_fused.reference.rootfree_shampoo import balance_rows_, scaled
from rootfree_fused.reference.structures import structure_of

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
SCALARS = {
    "beta1": 0.8,
    "beta2": 0.9,
    "damping": 0.1,
    "weight_decay": 0.1,
    "update_rms": 0.4,
    "row_beta": 0.7,
    "maximize": False,
}
LR = 0.05
CACHED = (True, True)


def rounded(x):
    return x.bfloat16().float()


def product(a, b):
    return rounded(a) @ rounded(b)


def left(factor, x):
    return structure_of(factor).left(rounded(factor), rounded(x))


def right(x, factor):
    return structure_of(factor).right(rounded(x), rounded(factor))


class Problem:
    """One call of the operator: `buckets` are (sizes, members, cached axes, axes).

    Of the axes, left out where both are dense, see helpers/blocks.py.
    """

    def __init__(self, buckets, param=F32, grad=None, like=torch.clone, factor_scale=1, **changes):
        self.scalars = {**SCALARS, **changes}
        self.params, self.grads, self.buffers, self.rows = [], [], [], []
        self.grams, self.factors, self.residuals, self.products = [], [], [], []
        self.sizes, steps = [], []
        for sizes, members, cached, *flags in buckets:
            structures = list(map(structure_for, *(flags or [(True, True)])))
            self.sizes += [sizes] * members
            states = [self._state(sizes, structures) for _ in range(members)]
            steps += range(2, members + 2)
            for rows, _, _, buffer in states:
                self.params.append(like(torch.randn(sizes).to(param)))
                self.grads.append(like((0.3 * torch.randn(sizes)).to(grad or param)))
                self.buffers.append(like(buffer.float()))
                if self.scalars["row_beta"] is not None:
                    self.rows.append(rows.float())
            for k in (0, 1):
                gram = torch.stack([state[1][k] for state in states]).float()
                self.grams.append((gram + gram.mT) / 2)
                factor = torch.stack([state[2][k] for state in states]).float()
                high, residual = matrix.split(factor_scale * factor)
                self.factors.append(high)
                self.residuals.append(residual)
                # Poisoned: an update writes it before anything reads it.
                poison = torch.full_like(high, NAN)
                self.products.append(poison if cached[k] else torch.empty(0))
        self.steps = torch.tensor(steps, dtype=F32)

    def _state(self, sizes, structures):
        """The rows' averages, S, K and M after a few steps of the specification."""
        param, rows = torch.zeros(sizes, dtype=F64), torch.zeros(sizes[0], dtype=F64)
        buffer = torch.zeros(sizes, dtype=F64)
        starts = zip(*reference.start_values(SCALARS["damping"]), strict=True)
        grams, factors = (
            [
                structure.from_matrix(value * torch.eye(d, dtype=F64))
                for d, value, structure in zip(sizes, values, structures, strict=True)
            ]
            for values in starts
        )
        spread = torch.linspace(0.1, 2, sizes[1], dtype=F64)  # not all directions alike
        for step in (1, 2, 3):
            grad = torch.randn(sizes, dtype=F64) * spread
            settings = {**SCALARS, "maximize": False, "lr": LR}
            reference.rootfree_shampoo_(param, grad, buffer, grams, factors, rows, step, **settings)
        return rows, grams, factors, buffer

    def run(self, update=True, refresh=False):
        torch.ops.rootfree_fused.rootfree_shampoo_(
            *(self.params, self.grads, self.buffers, self.rows),
            *(self.grams, self.factors, self.residuals, self.products),
            self.steps,
            torch.tensor(LR, dtype=F64),
            update_factors=update,
            refresh_products=refresh,
            **self.scalars,
        )

    def joined(self):
        """The factors of every axis, as the numbers that they stand for."""
        pairs = zip(self.factors, self.residuals, strict=True)
        return [matrix.join(f, r) for f, r in pairs]

    def outcome(self):
        return [self.params, self.buffers, self.rows, self.grams, self.joined()]

    def tensors(self):
        lists = (self.params, self.buffers, self.rows, self.grams, self.factors, self.residuals)
        return [t for tensors in (*lists, self.products) for t in tensors]

    def expected(self, exact, updates):
        """The outcome of steps, each of which updates the factors or does not.

        By the reference in float64 (exact), or by eager torch with the operator's roundings.
        """
        outcome = self.outcome()
        state = [[t.clone(memory_format=torch.contiguous_format) for t in ts] for ts in outcome]
        if exact:
            state = [[t.to(F64) for t in ts] for ts in state]
        params, buffers, rows, grams, factors = state
        axis = member = 0
        for axis in range(0, len(factors), 2):
            for i in range(len(factors[axis])):
                cached = [p.numel() > 0 for p in self.products[axis : axis + 2]]
                eager_step_ = functools.partial(rounded_step_, cached=cached)
                step_ = reference.rootfree_shampoo_ if exact else eager_step_
                for update in updates:
                    step_(
                        params[member],
                        self.grads[member].reshape(self.sizes[member]),
                        buffers[member].view(self.sizes[member]),
                        [g[i] for g in grams[axis : axis + 2]],
                        [f[i] for f in factors[axis : axis + 2]],
                        rows[member] if rows else None,
                        self.steps[member].item(),
                        lr=LR,
                        update_factors=update,
                        **self.scalars,
                    )
                member += 1
        return state

    def check(self, updates=(True,), factor=2.0):
        """The outcome is as near to float64 as eager torch, and the gradients are as they were."""
        eager, truth = self.expected(False, updates), self.expected(True, updates)
        grads = [g.clone() for g in self.grads]
        for update in updates:
            self.run(update)
        for actual, e, t in zip(self.outcome(), eager, truth, strict=True):
            for a, b, c in zip(actual, e, t, strict=True):
                assert_no_worse_than(a, b, c, factor=factor)
        assert_bits_equal(self.grads, grads)
        for gram in self.grams:
            assert torch.equal(gram, gram.mT)


def rounded_step_(
    param,
    grad,
    buffer,
    grams,
    factors,
    rows,
    step,
    *,
    lr,
    beta1,
    beta2,
    damping,
    weight_decay,
    update_rms,
    row_beta,
    maximize,
    update_factors,
    cached,
):
    g = scaled(grad.float(), 1.0)
    g = -g if maximize else g
    buffer.lerp_(g, 1 - beta1)
    update = rounded(buffer * beta1 + g * (1 - beta1))
    if update_factors:
        seen = right(g, factors[1]), left(factors[0].mT, g).T
        for gram, factor, unfolded in zip(grams, factors, seen, strict=True):
            structure, size = structure_of(factor), len(unfolded)
            gram.lerp_(structure.gram(rounded(unfolded)) / unfolded.shape[1], 1 - beta2)
            lam = damping * structure.diagonal(gram).sum() / size
            error = product(factor.mT, product(gram, factor) + lam * rounded(factor))
            structure.add_identity_(error, -1, size)
            squared = structure.norms(product(error, error))
            bound = torch.fmin(structure.norms(error), squared.sqrt())
            factor.sub_(product(factor, error) * (0.5 / bound.clamp_min(1)))
    rows_factors, columns_factors = (
        [product(factor, factor.mT)] if kept else [factor, factor.mT]
        for factor, kept in zip(factors, cached, strict=True)
    )
    for factor in reversed(rows_factors):
        update = left(factor, update)
    for factor in columns_factors:
        update = right(update, factor)
    if row_beta is not None:
        update = balance_rows_(update, rows, step, row_beta)
    rms = update_rms * reference.shape_scale(*update.shape)
    update = scaled(update, rms).reshape(param.shape)
    param.copy_(param.float() - lr * weight_decay * param.float() - lr * update)
