"""Gradients of micro-batches, as backwards leave them, and their means."""

from __future__ import annotations

import torch

SHAPES = [(7, 5), (11,), (), (3, 4, 2)]
F32, F64 = torch.float32, torch.float64


def gradients(count, dtype=F64, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        [0.1 * torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in shapes]
        for _ in range(count)
    ]


def backward(params, grads):
    """What a backward leaves: added to what is there."""
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            p.grad = g.clone() if p.grad is None else p.grad + g


def take(optimizer, params, grads, terms=None):
    for own, count in zip(grads, terms or [None] * len(grads), strict=True):
        backward(params, own)
        optimizer.accumulate(count)


def mean_of(grads, weights=None):
    weights = weights or [1.0] * len(grads)
    wide = [[g.to(torch.promote_types(g.dtype, F32)) for g in own] for own in grads]
    return [
        sum(w * g for w, g in zip(weights, column, strict=True)) / sum(weights)
        for column in zip(*wide, strict=True)
    ]


def set_mean(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad_dtype = g.dtype
        p.grad = g
