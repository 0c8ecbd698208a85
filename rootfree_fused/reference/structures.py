"""What a factor may be: dense, diagonal, or diagonal blocks; `compact_structures` has the rest.

A structure is a linear set of d x d matrices that has the identity and every product of two of its
own, with a projection of symmetric matrices onto it. Each is a class with what the methods do with
a factor K. Its methods take the tensor that represents K, as `shape` has it, or a stack of such
with more axes in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


class Structure:
    """A structure of factors K, each of which represents the matrix that it stands for."""

    name: str
    # Whether matrices represent K: those that GEMMs read, in the dtype of the GEMMs.
    is_dense = False
    axes: int  # of the tensor that represents one factor

    def shape(self, size: int) -> tuple[int, ...]:
        """Of the tensor that represents a factor of this size."""
        raise NotImplementedError

    def diagonal(self, factor: Tensor) -> Tensor:
        """A view of the diagonal of K, with zeros where the tensor is padded."""
        raise NotImplementedError

    def add_identity_(self, factor: Tensor, value: float | Tensor, size: int) -> None:
        """K <- K + value I; of padding nothing changes."""
        self.diagonal(factor).add_(value)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The factor that represents a (d, d) matrix of the structure."""
        raise NotImplementedError

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """K X, or K^T X, for X of shape (d, others)."""
        raise NotImplementedError

    def right(self, x: Tensor, factor: Tensor, *, transposed: bool = False) -> Tensor:
        """X K, or X K^T, for X of shape (others, d)."""
        return self.left(factor, x.mT, transposed=not transposed).mT

    def gram(self, unfolded: Tensor) -> Tensor:
        """M M^T as the structure holds it, for M of shape (d, others)."""
        raise NotImplementedError

    def average_gram_(
        self, momenta: Tensor, unfolded: Tensor, *, decay: float, weight: float
    ) -> None:
        """m <- decay m + weight gram(M), of a stack."""
        momenta.mul_(decay).add_(self.gram(unfolded).to(momenta.dtype), alpha=weight)

    def square(self, factor: Tensor) -> Tensor:
        """K^T K as the structure holds it."""
        raise NotImplementedError

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        """K m, along which K is updated."""
        raise NotImplementedError

    def square_sum(self, factor: Tensor) -> Tensor:
        """||K||_F^2, one of each of a stack.

        torch's norm adds float32 squares one by one, 1.5e-5 off at 1024 x 1024; its sum of all at
        once is split among the threads, whose number would show. Sums of rows are neither.
        """
        sums = factor.square()
        for _ in range(self.axes):
            sums = sums.sum(-1)
        return sums

    def norms(self, momentum: Tensor) -> Tensor:
        """||m||_F, by which the step of K is bounded, of a shape that multiplies with K."""
        return self.norm_squares(momentum).sqrt()

    def norm_squares(self, momentum: Tensor) -> Tensor:
        """The squares of `norms`."""
        return self.square_sum(momentum)[(..., *[None] * self.axes)]


class Dense(Structure):
    """K is a matrix, (d, d)."""

    name = "dense"
    is_dense = True
    axes = 2

    def shape(self, size: int) -> tuple[int, ...]:
        return size, size

    def diagonal(self, factor: Tensor) -> Tensor:
        return factor.diagonal(dim1=-2, dim2=-1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        return (factor.mT if transposed else factor) @ x

    def right(self, x: Tensor, factor: Tensor, *, transposed: bool = False) -> Tensor:
        return x @ (factor.mT if transposed else factor)

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

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1).clone()

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        return x * factor.unsqueeze(-1)

    def right(self, x: Tensor, factor: Tensor, *, transposed: bool = False) -> Tensor:
        return x * factor.unsqueeze(-2)

    def gram(self, unfolded: Tensor) -> Tensor:
        return unfolded.square().sum(-1)

    def square(self, factor: Tensor) -> Tensor:
        return factor.square()

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        return factor * momentum


@dataclass(frozen=True)
class Blocks(Structure):
    """K has blocks of one size b on its diagonal, (ceil(d / b), b, b), and zeros elsewhere.

    Of the last block the rows and columns beyond d are padding, zero in K and in all that it learns
    from; as K m is zero where K is, it stays so.

    joint_norm: whether all blocks of a factor are bounded by its norm, as released, or each by its
        own, as so many factors of size b would be.
    """

    block: int
    joint_norm: bool = False

    name = "block"
    is_dense = True
    axes = 3

    def shape(self, size: int) -> tuple[int, ...]:
        return -(-size // self.block), self.block, self.block

    def diagonal(self, factor: Tensor) -> Tensor:
        return factor.diagonal(dim1=-2, dim2=-1)

    def add_identity_(self, factor: Tensor, value: float | Tensor, size: int) -> None:
        self.diagonal(factor).add_(self._lives(factor, size).to(factor.dtype) * value)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        blocks = self._panels(self._panels(matrix).mT).mT
        return blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3).contiguous()

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        blocks = (factor.mT if transposed else factor) @ self._panels(x)
        return blocks.flatten(-3, -2)[..., : x.shape[-2], :]

    def right(self, x: Tensor, factor: Tensor, *, transposed: bool = False) -> Tensor:
        blocks = self._panels(x.mT).mT @ (factor.mT if transposed else factor)
        return blocks.transpose(-2, -3).flatten(-2)[..., : x.shape[-1]]

    def gram(self, unfolded: Tensor) -> Tensor:
        panels = self._panels(unfolded)
        return self.without_padding(panels @ panels.mT, unfolded.shape[-2])

    def average_gram_(
        self, momenta: Tensor, unfolded: Tensor, *, decay: float, weight: float
    ) -> None:
        panels = self._panels(unfolded).flatten(0, 1)
        DENSE.average_gram_(momenta.flatten(0, 1), panels, decay=decay, weight=weight)
        if unfolded.shape[-2] % self.block:
            momenta.copy_(self.without_padding(momenta, unfolded.shape[-2]))

    def square(self, factor: Tensor) -> Tensor:
        return factor.mT @ factor

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        return factor @ momentum

    def without_padding(self, factor: Tensor, size: int) -> Tensor:
        """With zeros where it is padded, whatever is there: 0 times an infinite number is NaN."""
        if size % self.block == 0:
            return factor
        lives = self._lives(factor, size)
        return torch.where(lives.unsqueeze(-1) & lives.unsqueeze(-2), factor, 0)

    def norm_squares(self, momentum: Tensor) -> Tensor:
        return super().norm_squares(momentum) if self.joint_norm else DENSE.norm_squares(momentum)

    def _lives(self, factor: Tensor, size: int) -> Tensor:
        """Which rows of each block, (blocks, b), are no padding."""
        *_, count, block = self.diagonal(factor).shape
        return torch.arange(count * block, device=factor.device).view(count, block) < size

    def _panels(self, x: Tensor) -> Tensor:
        """The rows of X, (d, others), that each block multiplies: (blocks, b, others)."""
        missing = -x.shape[-2] % self.block
        padded: Tensor = pad(x, (0, 0, 0, missing)) if missing else x
        return padded.unflatten(-2, (-1, self.block))  # type: ignore[no-any-return]


DENSE, DIAGONAL = Dense(), Diagonal()


def structure_of(factor: Tensor) -> Structure:
    """The structure of a factor, as the shape of its tensor tells; blocks are bounded each."""
    return (DIAGONAL, DENSE, Blocks(factor.shape[-1]))[factor.dim() - 1]


def structure_of_stack(factors: Tensor) -> Structure:
    """The structure of factors that are stacked."""
    return (DIAGONAL, DENSE, Blocks(factors.shape[-1]))[factors.dim() - 2]
