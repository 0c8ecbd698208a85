"""Shampoo as it is usually made: inverse fourth roots by eigendecompositions, batched by shape.

Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018. With
L and R starting at damping I, and everything in float32:

    L <- L + G G^T ; R <- R + G^T G ; p <- p - lr L^(-1/4) G R^(-1/4)

The roots are taken anew every `interval` steps, from the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class EighShampoo(Optimizer):
    """On matrices alone; equal shapes are decomposed in one call."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, damping: float = 1e-4, interval: int = 1
    ) -> None:
        super().__init__(params, {"lr": lr, "damping": damping, "interval": interval})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter; each has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for (m, n), params in shapes.items():
                state = self.state[params[0]]
                g = torch.stack([p.grad for p in params])
                if not state:
                    for key, d in (("left", m), ("right", n)):
                        one = torch.eye(d, device=g.device, dtype=g.dtype)
                        state[key] = group["damping"] * one.repeat(len(params), 1, 1)
                    state["step"] = 0
                state["left"].baddbmm_(g, g.mT)
                state["right"].baddbmm_(g.mT, g)
                if state["step"] % group["interval"] == 0:
                    state["roots"] = [
                        inverse_fourth_root(state[key], group["damping"])
                        for key in ("left", "right")
                    ]
                state["step"] += 1
                left, right = state["roots"]
                torch._foreach_add_(params, list((left @ g @ right).unbind()), alpha=-group["lr"])


def inverse_fourth_root(matrices: Tensor, smallest: float) -> Tensor:
    """Of symmetric matrices, (..., d, d), whose eigenvalues are `smallest` or more.

    In float32 the decomposition of a matrix of low rank gives some that are less, or negative.
    """
    values, vectors = torch.linalg.eigh(matrices)
    roots = values.clamp_min(smallest).pow(-0.25)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT
