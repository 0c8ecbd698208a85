"""The same values in other strides."""

from __future__ import annotations

import torch


def gapped(t):
    """Every second element of a larger tensor; the others are 7."""
    base = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype, device=t.device)
    base[..., ::2] = t
    return base[..., ::2]


def transposed(t):
    return t.mT.contiguous().mT


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def misaligned(t):
    """One element off the alignment of an allocation."""
    base = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return base[1:].view(t.shape).copy_(t)


def cropped(t):
    base = torch.full([n + 2 for n in t.shape], 7.0, dtype=t.dtype, device=t.device)
    return base[tuple(slice(1, -1) for _ in t.shape)].copy_(t)


def reversed_axes(t):
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def expanded(t):
    return t.flatten()[:1].view(()).expand(t.shape)


def expanded_rows(t):
    return t[..., :1].expand(t.shape)
