"""Buckets of which an axis may have blocks: of each axis True (dense), False, or a block's size."""

from __future__ import annotations

import torch

from rootfree_fused.reference.structures import DENSE, DIAGONAL, Blocks, structure_of


def structure_for(flag):
    """Of an axis of a bucket."""
    if isinstance(flag, bool):
        return DENSE if flag else DIAGONAL
    return Blocks(flag)


def as_matrix(factor, size):
    """The matrix of a factor of blocks; any other as it is."""
    return factor if factor.dim() < 3 else torch.block_diag(*factor)[:size, :size]


def as_factor(matrix, like):
    """A matrix as a factor of the structure that `like` has: the reverse of `as_matrix`."""
    return structure_of(like).from_matrix(matrix) if like.dim() == 3 else matrix


def without_padding(stack, size):
    """A stack of factors of blocks with zeros where it is padded."""
    if stack.dim() < 4:
        return stack
    lives = torch.arange(stack.shape[1] * stack.shape[2]).view(stack.shape[1:3]) < size
    return stack * (lives.unsqueeze(-1) & lives.unsqueeze(-2))
