"""Matrices whose rows stay on the ranks that have them, which sum what a step needs of all rows.

The first axis of such a matrix has a diagonal factor: an entry of it, of the average that it
follows, of the momentum and of the parameter is needed by its row alone. Each rank keeps these as
the parameter lies, and has the factors of the other axes as all ranks have them, which follow from
the same sums by the same products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.checks import state_dtype
from ..reference.rows import Rows, Scale, scale_of
from .ranks import Ranks


class RowsOfRanks(Rows):
    """The rows of a parameter that this rank has, among those of all that share it.

    counted: whether they are, of equal ones on several ranks those of one.
    """

    def __init__(self, param: Tensor, ranks: Ranks, counted: bool) -> None:
        self.param, self._ranks, self._counted = param, ranks, counted
        self._scale = 0.0, 0.0  # of the gradient
        self.grad_scale = 1.0  # by which a gradient scaler multiplied it

    # What the first message of a step has ------------------------------------------------------

    def own_scale(self, grad: Tensor | None) -> Tensor:
        """Two numbers that tell the scale of this part of a gradient, float64."""
        if grad is None:
            return torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        return self._own_scale(grad.to(state_dtype(self.param))).double()

    def hear(self, scales: Tensor) -> None:
        """What `own_scale` is on every rank, (ranks, 2) on the host."""
        largest, square = self._of_all(scales)
        self._scale = largest.item(), square.item()

    def mean_square_of_gradient(self) -> float:
        """Before a gradient scaler's scale is taken out."""
        largest, square = self._scale
        return square * largest * largest

    # What the specification asks ---------------------------------------------------------------

    def count(self, x: Tensor) -> int:
        return self.param.shape[0]

    def total(self, *sums: Tensor) -> Sequence[Tensor]:
        flat = torch.cat([value.reshape(-1) for value in sums])
        if not self._counted:
            flat.zero_()
        self._ranks.sum_(flat)
        parts = flat.split([value.numel() for value in sums])
        return [part.view(value.shape) for part, value in zip(parts, sums, strict=True)]

    def scale(self, x: Tensor) -> Scale:
        return self._of_all(self._ranks.gathered(self._own_scale(x)))

    def scale_of_gradient(self, grad: Tensor) -> Scale:
        largest, square = self._scale
        return grad.new_full((), largest / self.grad_scale), grad.new_full((), square)

    def learns(self, grad: Tensor) -> Tensor:
        return grad.new_full((), self._scale[0] != 0, dtype=torch.bool)

    def _own_scale(self, x: Tensor) -> Tensor:
        """The largest magnitude of this part, and the sum of squares in units of its square."""
        if not self._counted or not x.numel():
            return x.new_zeros(2)
        largest, square = scale_of(x)
        return torch.stack([largest, square * x.numel()])

    def _of_all(self, scales: Tensor) -> Scale:
        """Of the whole, from what `_own_scale` is on every rank."""
        largest = scales[:, 0].amax()
        units = scales[:, 0] / largest.clamp_min(torch.finfo(scales.dtype).tiny)
        return largest, (scales[:, 1] * units.square()).sum() / self.param.numel()
