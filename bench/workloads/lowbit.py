"""Steps of the operator on weights and states in fewer bytes, on one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_fused.ops import by_reference
from rootfree_fused.ops.methods import ADAMW
from rootfree_fused.reference.formats import BLOCK, encoded

F32, BF16 = torch.float32, torch.bfloat16
INT8, INT16, UINT8 = torch.int8, torch.int16, torch.uint8
_SCALE_BYTES = {INT8: 4, UINT8: 1}
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "damping": 1e-3, "weight_decay": 0.1, "maximize": False}


class LowbitCase(NamedTuple):
    """Dtypes of a step, which may round bfloat16 parameters stochastically."""

    param: torch.dtype
    grad: torch.dtype
    residual: torch.dtype | None
    average: torch.dtype
    second_moment: torch.dtype
    stochastic: bool = False

    @property
    def bytes_moved(self) -> int:
        """Of a parameter, read and written, but for the scales of blocks."""
        kept = (self.param, self.residual, self.average, self.second_moment)
        return self.grad.itemsize + sum(2 * dtype.itemsize for dtype in kept if dtype is not None)

    @property
    def bytes_with_scales(self) -> float:
        """As `bytes_moved`, with the scales."""
        scales = [_SCALE_BYTES.get(dtype, 0) for dtype in (self.average, self.second_moment)]
        return self.bytes_moved + 2 * sum(scales) / BLOCK


CASES = {
    "bfloat16 + 8, bfloat16": LowbitCase(BF16, BF16, INT8, BF16, BF16),
    "bfloat16 + 8, 8bit": LowbitCase(BF16, BF16, INT8, INT8, UINT8),
    "bfloat16 stochastic, 8bit": LowbitCase(BF16, BF16, None, INT8, UINT8, stochastic=True),
    "bfloat16 + 8, 8bit, float32 gradients": LowbitCase(BF16, F32, INT8, INT8, UINT8),
    "bfloat16 + 16, float32": LowbitCase(BF16, BF16, INT16, F32, F32),
    "float32, 8bit": LowbitCase(F32, F32, None, INT8, UINT8),
}
# Those whose speed has a target.
TIMED = tuple(CASES)[:3]


class PackedCase(NamedTuple):
    """Dtypes of what stands for a float32 tensor, and of its residual or scales."""

    stored: torch.dtype
    beside: torch.dtype | None

    @property
    def bytes_moved(self) -> int:
        """Of an element that is packed or unpacked, but for the scales of blocks."""
        kept = self.stored, None if self.stored in _SCALE_BYTES else self.beside
        return F32.itemsize + sum(dtype.itemsize for dtype in kept if dtype is not None)

    @property
    def bytes_with_scales(self) -> float:
        """As `bytes_moved`, with the scales."""
        return self.bytes_moved + _SCALE_BYTES.get(self.stored, 0) / BLOCK


PACKED = {
    "bfloat16 + 8": PackedCase(BF16, INT8),
    "bfloat16 + 16": PackedCase(BF16, INT16),
    "bfloat16": PackedCase(BF16, None),
    "S8": PackedCase(INT8, F32),
    "E5M3": PackedCase(UINT8, UINT8),
}
TIMED_PACKED = ("bfloat16 + 8", "S8")


class Packed:
    """A float32 tensor of one axis, and what stands for it."""

    def __init__(self, case: PackedCase, values: Tensor) -> None:
        count = len(values)
        others = -(-count // BLOCK) if case.stored in _SCALE_BYTES else count
        self.values = [values]
        self.stored = [torch.zeros_like(values, dtype=case.stored)]
        self.beside = [] if case.beside is None else [values.new_zeros(others, dtype=case.beside)]
        self.steps = torch.ones(1, device=values.device)

    def pack(self, body: Callable[..., None] = torch.ops.rootfree_fused.pack_) -> None:
        """Store the tensor."""
        random: dict[str, Any] = {"seeds": [0], "firsts": [0], "stream": 0}
        body(self.stored, self.beside, self.values, self.steps, **random)

    def unpack(self, body: Callable[..., None] = torch.ops.rootfree_fused.unpack_) -> None:
        """The tensor from what is stored."""
        body(self.values, self.stored, self.beside)


def packed_otherwise(case: PackedCase, elements: int, device: torch.device) -> float:
    """The share of a tensor that is another once stored and read than by the specification."""
    values = torch.randn(elements, device=device, generator=torch.Generator(device).manual_seed(0))
    found, wanted = (Packed(case, values.clone()) for _ in range(2))
    found.pack()
    found.unpack()
    wanted.pack(by_reference.pack_)
    wanted.unpack(by_reference.unpack_)
    return (found.values[0] != wanted.values[0]).double().mean().item()


class Step:
    """RootFreeAdamW's operator on a tensor, from averages of 0 and second moments of 1."""

    def __init__(self, case: LowbitCase, elements: int, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def drawn(dtype: torch.dtype) -> Tensor:
            return torch.randn(elements, dtype=dtype, device=device, generator=generator)

        self.grad = drawn(case.grad).mul_(0.1)
        states = [
            _filled(value, dtype, elements, device)
            for value, dtype in ((0.0, case.average), (1.0, case.second_moment))
        ]
        residuals = []
        if case.residual is not None:
            residuals = [torch.zeros(elements, dtype=case.residual, device=device)]
        scales = [[scale] if scale is not None else [] for _, scale in states]
        self.lists = [[drawn(case.param)], *([code] for code, _ in states), residuals, *scales]
        self.steps = torch.ones(1, device=device)

    def run(self, body: Callable[..., None] = torch.ops.rootfree_fused.lowbit_adamw_) -> None:
        """One step."""
        params, *others = self.lists
        numbers = self.steps, torch.tensor(1e-3)
        random: dict[str, Any] = {"seeds": [0], "firsts": [0], "stochastic": self.case.stochastic}
        settings = {**SETTINGS, "bias_correction": True, "batch_size": torch.tensor(8.0)}
        body(params, [self.grad], *others, *numbers, **random, **settings)


def others_than_specified(case: LowbitCase, elements: int, device: torch.device) -> float:
    """Of what a step stores, the largest share in a list that the specification stores otherwise.

    An update that rounds otherwise moves few codes, by one.
    """
    steps = [Step(case, elements, device) for _ in range(2)]
    for step, body in zip(steps, ({}, {"body": by_reference.lowbit(ADAMW)}), strict=True):
        step.run(**body)
    lists = zip(*(step.lists for step in steps), strict=True)
    pairs = [pair for both in lists for pair in zip(*both, strict=True)]
    return max((found != wanted).double().mean().item() for found, wanted in pairs)


def _filled(
    value: float, dtype: torch.dtype, elements: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """A state that has this value everywhere, and its scales."""
    code, scale = encoded(torch.full((BLOCK,), value, device=device), dtype)
    blocks = -(-elements // BLOCK)
    return code[:1].repeat(elements), None if scale is None else scale.repeat(blocks)
