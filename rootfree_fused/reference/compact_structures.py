"""The structures of singd that are neither dense, diagonal nor blocks; no kernel has them.

Source: Lin et al., "Structured Inverse-Free Natural Gradient", ICML 2024 (arXiv 2312.05705), and
its released code, singd. In each, entry (i, j) of K stands for (i, j) and (j, i) of the symmetric
matrix that is projected, so the projection doubles what is off the diagonal (blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .structures import Structure


@dataclass(frozen=True)
class Hierarchical(Structure):
    """K = [[A, B, F], [0, diag(C), 0], [0, D, E]], as one vector of these, in this order.

    A has `first` rows and columns of the `size`, E `last`; where they do not fit, A comes first.
    """

    size: int
    first: int
    last: int

    name = "hierarchical"
    axes = 1

    @property
    def sides(self) -> tuple[int, int, int]:
        """The sizes of A, C and E."""
        a = min(self.first, self.size)
        e = min(self.last, self.size - a)
        return a, self.size - a - e, e

    def shape(self, size: int) -> tuple[int, ...]:
        a, c, e = self.sides
        return (a * size + c + e * (c + e),)

    def parts(self, factor: Tensor) -> tuple[Tensor, ...]:
        """Views of A, B, F, C, D and E."""
        a, c, e = self.sides
        shapes = (a, a), (a, c), (a, e), (c,), (e, c), (e, e)
        counts = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in shapes]
        return tuple(
            part.unflatten(-1, shape) if len(shape) > 1 else part
            for part, shape in zip(factor.split(counts, -1), shapes, strict=True)
        )

    def add_identity_(self, factor: Tensor, value: float | Tensor, size: int) -> None:
        a, _, _, c, _, e = self.parts(factor)
        for diagonal in (a.diagonal(dim1=-2, dim2=-1), c, e.diagonal(dim1=-2, dim2=-1)):
            diagonal.add_(value)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        top, middle, bottom = (rows.split(self.sides, -1) for rows in matrix.split(self.sides, -2))
        return _vector(*top, middle[1].diagonal(dim1=-2, dim2=-1), *bottom[1:])

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        a, b, f, c, d, e = self.parts(factor)
        top, middle, bottom = x.split(self.sides, -2)
        scaled = c.unsqueeze(-1) * middle
        if transposed:
            rows = (
                a.mT @ top,
                b.mT @ top + scaled + d.mT @ bottom,
                f.mT @ top + e.mT @ bottom,
            )
        else:
            rows = a @ top + b @ middle + f @ bottom, scaled, d @ middle + e @ bottom
        return torch.cat(rows, -2)

    def gram(self, unfolded: Tensor) -> Tensor:
        top, middle, bottom = unfolded.split(self.sides, -2)
        return _vector(
            top @ top.mT,
            2 * top @ middle.mT,
            2 * top @ bottom.mT,
            middle.square().sum(-1),
            2 * bottom @ middle.mT,
            bottom @ bottom.mT,
        )

    def square(self, factor: Tensor) -> Tensor:
        a, b, f, c, d, e = self.parts(factor)
        return _vector(
            a.mT @ a,
            2 * a.mT @ b,
            2 * a.mT @ f,
            c.square() + b.square().sum(-2) + d.square().sum(-2),
            2 * (f.mT @ b + e.mT @ d),
            f.mT @ f + e.mT @ e,
        )

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        a, b, f, c, d, e = self.parts(factor)
        ma, mb, mf, mc, md, me = self.parts(momentum)
        columns = mc.unsqueeze(-2)
        return _vector(
            a @ ma,
            a @ mb + b * columns + f @ md,
            a @ mf + f @ me,
            c * mc,
            d * columns + e @ md,
            e @ me,
        )


@dataclass(frozen=True)
class Toeplitz(Structure):
    """K is a triangle with v_j everywhere on its j-th diagonal from the main one; v represents it.

    Products are convolutions, by FFT in float32 or float64.
    """

    lower: bool

    axes = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        return "lower_toeplitz" if self.lower else "upper_toeplitz"

    def shape(self, size: int) -> tuple[int, ...]:
        return (size,)

    def add_identity_(self, factor: Tensor, value: float | Tensor, size: int) -> None:
        factor[..., 0].add_(value)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return (matrix[..., :, 0] if self.lower else matrix[..., 0, :]).clone()

    def left(self, factor: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        return _convolved(factor, x.mT, backwards=transposed == self.lower).mT

    def gram(self, unfolded: Tensor) -> Tensor:
        rows = unfolded.mT
        return self._means(_convolved(rows, rows, backwards=True).sum(-2))

    def square(self, factor: Tensor) -> Tensor:
        # The sum over a of (d - a - j) v_a v_(a+j).
        weighted = _lengths(factor) * factor
        return self._means(_convolved(factor, weighted, backwards=True))

    def product(self, factor: Tensor, momentum: Tensor) -> Tensor:
        return _convolved(factor, momentum)

    def square_sum(self, factor: Tensor) -> Tensor:
        return (_lengths(factor) * factor.square()).sum(-1)

    def _means(self, sums: Tensor) -> Tensor:
        """Of sums of diagonals, doubled off the main one."""
        means = sums * 2 / _lengths(sums)
        means[..., 0] /= 2
        return means


def _vector(*parts: Tensor) -> Tensor:
    """The parts of a hierarchical factor as one; the fourth is a vector."""
    return torch.cat([p if i == 3 else p.flatten(-2) for i, p in enumerate(parts)], -1)


def _lengths(v: Tensor) -> Tensor:
    """The elements on each diagonal."""
    return torch.arange(v.shape[-1], 0, -1, dtype=v.dtype, device=v.device)


def _convolved(v: Tensor, x: Tensor, *, backwards: bool = False) -> Tensor:
    """The first d entries of v * x along the last axis, or of the correlation of v with x.

    (v * x)_i = sum_a v_a x_(i-a); backwards sum_a v_a x_(i+a).
    """
    if not x.numel():  # of which there is no FFT
        return torch.zeros_like(x)
    d = x.shape[-1]
    length = 1 << (2 * d - 1).bit_length()
    spectrum = torch.fft.rfft(v, length)
    spectrum = spectrum.conj() if backwards else spectrum
    if v.dim() < x.dim():
        spectrum = spectrum.unsqueeze(-2)
    product: Tensor = torch.fft.irfft(spectrum * torch.fft.rfft(x, length), length)
    return product[..., :d]
