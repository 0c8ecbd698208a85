"""What a factor may be: dense, or diagonal; each with the four things that IF-Shampoo does with it.

A structure is a class, so that another (blocks) is one more of them. Its methods take the tensor
that represents a factor, (d, d) or (d,), or a stack of such with one axis more in front.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Structure:
    """A structure of factors K of size d, which represents the matrices that it can hold."""

    name: str
    is_dense = False
    axes: int  # of the tensor that represents one factor

    def shape(self, size: int) -> tuple[int, ...]:
        """Of the tensor that represents a factor."""
        raise NotImplementedError

    def diagonal(self, factor: Tensor) -> Tensor:
        """A view of the diagonal of K."""
        raise NotImplementedError

    def identity_like(self, factor: Tensor) -> Tensor:
        raise NotImplementedError

    def transposed(self, factor: Tensor) -> Tensor:
        """K^T."""
        raise NotImplementedError

    def left(self, factor: Tensor, x: Tensor) -> Tensor:
        """K X: K applied to every column."""
        raise NotImplementedError

    def right(self, x: Tensor, factor: Tensor) -> Tensor:
        """X K: K^T applied to every row."""
        raise NotImplementedError

    def gram(self, unfolded: Tensor) -> Tensor:
        """What of M M^T the structure holds, for M of shape (d, others)."""
        raise NotImplementedError

    def average_gram_(
        self, momenta: Tensor, unfolded: Tensor, *, decay: float, weight: float
    ) -> None:
        """m <- decay m + weight gram(M), of a stack."""
        momenta.mul_(decay).add_(self.gram(unfolded).to(momenta.dtype), alpha=weight)

    def square(self, factor: Tensor) -> Tensor:
        """K^T K."""
        raise NotImplementedError

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        """K m, along which K is updated."""
        raise NotImplementedError


class Dense(Structure):
    """K is a matrix, (d, d)."""

    name = "dense"
    is_dense = True
    axes = 2

    def shape(self, size: int) -> tuple[int, ...]:
        return size, size

    def diagonal(self, factor: Tensor) -> Tensor:
        return factor.diagonal(dim1=-2, dim2=-1)

    def identity_like(self, factor: Tensor) -> Tensor:
        return torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)

    def transposed(self, factor: Tensor) -> Tensor:
        return factor.mT

    def left(self, factor: Tensor, x: Tensor) -> Tensor:
        return factor @ x

    def right(self, x: Tensor, factor: Tensor) -> Tensor:
        return x @ factor

    def gram(self, unfolded: Tensor) -> Tensor:
        return unfolded @ unfolded.mT

    def average_gram_(
        self, momenta: Tensor, unfolded: Tensor, *, decay: float, weight: float
    ) -> None:
        if momenta.dtype == unfolded.dtype:
            momenta.baddbmm_(unfolded, unfolded.mT, beta=decay, alpha=weight)
        else:
            super().average_gram_(momenta, unfolded, decay=decay, weight=weight)

    def square(self, factor: Tensor) -> Tensor:
        return factor.mT @ factor

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        return factor @ momentum


class Diagonal(Structure):
    """K is diagonal, and its diagonal represents it, (d,)."""

    name = "diagonal"
    axes = 1

    def shape(self, size: int) -> tuple[int, ...]:
        return (size,)

    def diagonal(self, factor: Tensor) -> Tensor:
        return factor

    def identity_like(self, factor: Tensor) -> Tensor:
        return torch.ones_like(factor)

    def transposed(self, factor: Tensor) -> Tensor:
        return factor

    def left(self, factor: Tensor, x: Tensor) -> Tensor:
        return x * factor.unsqueeze(-1)

    def right(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * (factor if factor.dim() == 1 else factor.unsqueeze(-2))

    def gram(self, unfolded: Tensor) -> Tensor:
        return unfolded.square().sum(-1)

    def square(self, factor: Tensor) -> Tensor:
        return factor.square()

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        return factor * momentum


DENSE, DIAGONAL = Dense(), Diagonal()
STRUCTURES: dict[str, Structure] = {structure.name: structure for structure in (DENSE, DIAGONAL)}


def structure_of(factor: Tensor) -> Structure:
    """The structure of a factor, which the shape of its tensor tells."""
    return next(s for s in STRUCTURES.values() if s.axes == factor.dim())


def structure_of_stack(factors: Tensor) -> Structure:
    """The structure of factors that are stacked."""
    return next(s for s in STRUCTURES.values() if s.axes == factors.dim() - 1)
