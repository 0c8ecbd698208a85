"""Assertions in the domain's terms: errors are compared with the eager reference's own error."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest absolute value of the float64 truth."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - truth).abs().max() / scale).item()


def assert_no_worse_than(
    actual: Tensor, eager: Tensor, truth: Tensor, *, factor: float = 2.0
) -> None:
    """`actual` is as near to the float64 truth as the eager computation in the same dtypes.

    The floor is one rounding of the output dtype: an eager result that happens to be exact must not
    forbid the half unit in the last place that any other order of operations may cost.
    """
    assert actual.dtype == eager.dtype, (actual.dtype, eager.dtype)
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    assert truth.dtype == torch.float64, truth.dtype
    assert not torch.isnan(actual).any(), "not every element was written"
    floor = torch.finfo(actual.dtype).eps
    allowed = factor * max(relative_error(eager, truth), floor)
    error = relative_error(actual, truth)
    assert error <= allowed, f"relative error {error:.3g} exceeds {allowed:.3g}"


def assert_bits_equal(actual, expected):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        as_integer = integers[a.element_size()]
        assert torch.equal(a.contiguous().view(as_integer), e.contiguous().view(as_integer))
