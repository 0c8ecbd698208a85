"""Sums of micro-batches for the diagonal updates, and the updates that take them."""

from __future__ import annotations

import torch
from helpers.operators import ADAMW, RMSPROP, SIGN, for_operators

from rootfree_fused.ops import by_reference
from rootfree_fused.ops.methods import METHODS
from rootfree_fused.reference import square_weights

KINDS = ("micro", "variance", "mean")
_COUNT = 4  # micro-batches
_WEIGHT = 3.0  # of each
# By name: operator, settings, states, whether steps are given.
UPDATES = {
    "rmsprop": ("rmsprop_", RMSPROP, 2, False),
    "rmsprop without buffer": ("rmsprop_", {**RMSPROP, "momentum": 0.0}, 1, False),
    "rmsprop as released, ascending": (
        "rmsprop_",
        {**RMSPROP, "decoupled": False, "maximize": True},
        2,
        False,
    ),
    "rmsprop, s is the target": ("rmsprop_", {**RMSPROP, "alpha": 0.0, "damping": 1.0}, 2, False),
    "adamw": ("adamw_", ADAMW, 2, False),
    "adamw corrected": ("adamw_", ADAMW, 2, True),
    "adamw ascending": ("adamw_", {**ADAMW, "maximize": True}, 2, True),
    "sign": ("sign_", {**SIGN, "sign_last": False}, 1, False),
    "sign ascending": ("sign_", {**SIGN, "sign_last": False, "maximize": True}, 1, False),
}
# Every update with every kind that it takes.
CASES = [
    (update, kind)
    for update in UPDATES
    for kind in (("signs",) if update.startswith("sign") else KINDS)
]


def weights_of(kind, count=_COUNT, weight=_WEIGHT):
    """What weighs the parts of so many micro-batches, by the operators' names."""
    if kind == "signs":
        return {"part_weight": 1 / (count * weight)}
    weights = square_weights(kind, count)._asdict()
    return {f"{name}_weight": value for name, value in weights.items()}


class Sums:
    """Lists of one update with what micro-batches sum up to.

    `like` is called once for each parameter and state, `grad_like` for each sum and part.
    """

    def __init__(
        self,
        case,
        shapes,
        dtypes=(torch.float32, torch.float32),
        like=torch.clone,
        grad_like=None,
        device="cpu",
    ):
        update, kind = case
        self.name, self.scalars, states, has_steps = UPDATES[update]
        self.more = weights_of(kind)
        param_dtype, grad_dtype = dtypes
        grad_like = grad_like or like
        state_dtype = torch.promote_types(param_dtype, torch.float32)

        def made(draw, dtype, lay):
            return [lay(draw(shape).to(device, dtype)) for shape in shapes]

        self.params = made(torch.randn, param_dtype, like)
        self.states = [
            made(lambda shape: torch.rand(shape) + 0.5, state_dtype, like) for _ in range(states)
        ]
        drawn = [[torch.randn(shape) + 0.5 for shape in shapes] for _ in range(_COUNT)]
        sums = [_WEIGHT * sum(grads) for grads in zip(*drawn, strict=True)]
        part = torch.sign if kind == "signs" else lambda g: _WEIGHT * g * g
        parts = [_WEIGHT * sum(map(part, grads)) for grads in zip(*drawn, strict=True)]
        self.grads, self.parts = (
            [grad_like(t.to(device, dtype)) for t in tensors]
            for tensors, dtype in ((sums, grad_dtype), (parts, state_dtype))
        )
        self.grad_scale = torch.tensor(_COUNT * _WEIGHT, device=device)
        self.steps = torch.arange(1.0, len(shapes) + 1, device=device) if has_steps else None

    def arguments(self, dtype=None):
        """As the operator takes them, positional and by name: copies, in `dtype` where given."""
        lists, keywords = self._arguments()
        for tensors in (*(ts for ts in lists if isinstance(ts, list)), keywords["parts"]):
            tensors[:] = [t.to(dtype or t.dtype, copy=True) for t in tensors]
        return lists, keywords

    def _arguments(self):
        method = METHODS[self.name]
        states = [*self.states, *[[]] * (len(method.states) - len(self.states))]
        lists = [list(tensors) for tensors in (self.params, self.grads, *states)]
        counted = [self.steps] if method.counts else []
        given = {"grad_scale": self.grad_scale, "parts": list(self.parts)}
        lr = torch.tensor(0.5, dtype=torch.float64)
        return [*lists, *counted, lr], for_operators(self.scalars) | given | self.more

    def run(self, operator=None):
        """One step in place, by the operator or by another body."""
        arguments, keywords = self._arguments()
        with torch.no_grad():
            (operator or getattr(torch.ops.rootfree_fused, self.name))(*arguments, **keywords)

    def expected(self, dtype=None):
        """[params, states...] after one step of the specification; in `dtype` where given."""
        arguments, keywords = self.arguments(dtype)
        by_reference.diagonal(METHODS[self.name])(*arguments, **keywords)
        return [arguments[0], *arguments[2 : 2 + len(self.states)]]

    def written(self):
        return [self.params, *self.states]
