"""Sums of micro-batches, and steps on them, on one tensor: ours and what torch has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rootfree_fused.ops import by_reference
from rootfree_fused.ops.methods import RMSPROP
from rootfree_fused.reference import square_weights

from ..measuring.common import Call, Tensors, dtype_name, error_ratio

F32, BF16 = torch.float32, torch.bfloat16
OURS = ("accumulate_", "rmsprop_")  # how their names begin
_BATCHES = 4
_WEIGHTS = {
    f"{name}_weight": value for name, value in square_weights("mean", _BATCHES)._asdict().items()
}
_SETTINGS = {
    "alpha": 0.99,
    "damping": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "decoupled": True,
    "maximize": False,
}


class MicroBatches:
    """A tensor's sums, gradients of either dtype, and what a step has."""

    def __init__(self, elements: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn() -> Tensor:
            return torch.randn(elements, device=device, generator=generator).mul_(0.1)

        self.sums, self.squares = drawn(), drawn().square_()
        self.grads = {F32: drawn()}
        self.grads[BF16] = self.grads[F32].bfloat16()
        self.state = {"param": drawn(), "square_avg": torch.ones_like(self.sums)}
        self.state["momentum_buffer"] = torch.zeros_like(self.sums)

    def runs(self) -> Iterator[tuple[str, float, Call]]:
        """By name the bytes an element that must be moved, and a call."""
        for dtype, grad in self.grads.items():
            read, of = grad.itemsize, f"{dtype_name(dtype)} gradients"
            accumulate = partial(self.accumulate, dtype)
            yield f"accumulate_, {of}", read + 8, accumulate
            yield f"torch add_, {of}", read + 8, partial(self.sums.add_, grad)
            yield f"accumulate_ with squares, {of}", read + 16, partial(accumulate, squares=True)
            first = partial(accumulate, squares=True, first=True)
            yield f"accumulate_ with squares, the first, {of}", read + 8, first
            yield f"torch foreach with squares, {of}", read + 16, partial(self.foreach, grad)
        yield "rmsprop_, momentum 0.9", 28, self.step
        yield "rmsprop_, momentum 0.9, on squares", 32, partial(self.step, squares=True)

    def accumulate(
        self,
        dtype: torch.dtype,
        squares: bool = False,
        first: bool = False,
        body: Callable[..., None] = torch.ops.rootfree_fused.accumulate_,
    ) -> None:
        """A micro-batch more."""
        parts = [self.squares] if squares else []
        body([self.sums], parts, [self.grads[dtype]], weight=1.0, signs=False, first=first)

    def foreach(self, grad: Tensor) -> None:
        """The same by torch, which reads the gradient twice."""
        torch._foreach_add_([self.sums], [grad])
        torch._foreach_addcmul_([self.squares], [grad], [grad])

    def step(
        self,
        squares: bool = False,
        body: Callable[..., None] = torch.ops.rootfree_fused.rmsprop_,
    ) -> None:
        """A step on the sums."""
        param, square_avg, buffer = ([tensor] for tensor in self.state.values())
        given: dict[str, Any] = {"grad_scale": torch.tensor(float(_BATCHES))}
        if squares:
            given |= {"parts": [self.squares], **_WEIGHTS}
        numbers = _SETTINGS | {"batch_size": torch.tensor(8.0)}
        lr = torch.tensor(1e-3)
        body(param, [self.sums], square_avg, buffer, lr, **numbers, **given)


def error_of(name: str, elements: int, device: torch.device) -> float:
    """That of a call of ours, by `error_ratio`."""
    grad = BF16 if "bfloat16" in name else F32
    squares, first = "squares" in name, "first" in name

    def results(dtype: torch.dtype, specified: bool) -> Tensors:
        mine = MicroBatches(elements, device)
        mine.sums, mine.squares = mine.sums.to(dtype), mine.squares.to(dtype)
        mine.state = {key: value.to(dtype) for key, value in mine.state.items()}
        if name.startswith("rmsprop_"):
            mine.step(squares, **({"body": by_reference.diagonal(RMSPROP)} if specified else {}))
            return mine.state
        body = {"body": by_reference.accumulate_} if specified else {}
        mine.accumulate(grad, squares, first, **body)
        return {"sums": mine.sums} | ({"squares": mine.squares} if squares else {})

    three = results(F32, False), results(F32, True), results(torch.float64, True)
    return error_ratio([three])
