"""What the specification takes over all rows of a matrix, where one has them all or a part of them.

Where the first axis has a diagonal factor, a step on some of the rows needs of the others only what
sums over the rows tell: the grams of the other axes, and a few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a tensor: its largest magnitude, and the mean of its squares in units of the square of that.
Scale = tuple[Tensor, Tensor]


class Rows:
    """All rows, of one who has them.

    A subclass has some of them, and all others have the rest: whoever steps on a part calls the
    same methods in the same order.
    """

    def count(self, x: Tensor) -> int:
        """How many there are."""
        return x.shape[0]

    def total(self, *sums: Tensor) -> Sequence[Tensor]:
        """Sums over the rows that are here as sums over all."""
        return sums

    def scale(self, x: Tensor) -> Scale:
        """Of a tensor that has these rows."""
        return scale_of(x)

    def scale_of_gradient(self, grad: Tensor) -> Scale:
        """Of the gradient, which may have been told before the step."""
        return self.scale(grad)

    def learns(self, grad: Tensor) -> Tensor:
        """Whether the gradient is not exactly zero."""
        return (grad != 0).any()


def scale_of(x: Tensor) -> Scale:
    """The largest entry is taken out first, so that no square leaves the range of the dtype."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    return largest, (x / largest.clamp_min(torch.finfo(x.dtype).tiny)).square().mean()


ALL_ROWS = Rows()
