"""KL-Shampoo and KL-SOAP, by an eigendecomposition of every factor at every step.

Lin, Lowe, Dangel, Eschenhagen, Xu and Grosse, "Understanding and Improving Shampoo and SOAP via
Kullback-Leibler Minimization", ICLR 2026, arXiv 2509.03378. For a gradient G (m, n), in float32,
both factors starting at `initial` I and those on the right being the ones from before the step:

    S_A <- beta2 S_A + (1 - beta2) G S_B^-1 G^T / n
    S_B <- beta2 S_B + (1 - beta2) G^T S_A^-1 G / m
    M   <- beta1 M + (1 - beta1) G
    KL-Shampoo   W <- W - lr S_A^-1/2 M S_B^-1/2
    KL-SOAP      W <- W - lr Q_A adam(Q_A^T M Q_B) Q_B^T,   Q the eigenvectors of S

where adam divides by the root of the average of (Q_A^T G Q_B)^2. The authors' code renews Q every
ten steps by a QR decomposition, and averages eigenvalues in the basis of before; taken anew at
every step the decomposition needs neither. Weight decay is decoupled, and vectors take Adam.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Eigenvalues below this share of the largest are what rounding left of them in float32.
LEAST = 1e-6


class KLShampoo(Optimizer):
    """Defaults as in the authors' code, 0.1 for the first eigenvalues too."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        initial: float = 0.1,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**settings, "initial": initial})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                grad = p.grad.flatten(1) if p.ndim > 1 else p.grad
                if not state:
                    self._start(state, grad, group)
                state["step"] += 1
                state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
                if p.ndim > 1:
                    update_factors_(state, grad, group["betas"][1])
                    update = self._update(state, grad, group)
                else:
                    update = adam(state, grad, state["exp_avg"], group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.view_as(p), alpha=group["lr"])

    def _start(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> None:
        state.update(step=0, exp_avg=torch.zeros_like(grad))
        if grad.ndim > 1:
            eyes = [torch.eye(d, dtype=grad.dtype, device=grad.device) for d in grad.shape]
            state["factors"] = [group["initial"] * eye for eye in eyes]
            state["values"] = [group["initial"] * eye.diagonal() for eye in eyes]
            state["vectors"] = eyes

    def _update(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        left, right = (
            (vectors * values.rsqrt()) @ vectors.mT
            for vectors, values in zip(state["vectors"], state["values"], strict=True)
        )
        return left @ state["exp_avg"] @ right


class KLSOAP(KLShampoo):
    """Adam in the eigenvectors of KL-Shampoo's factors."""

    def _update(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        left, right = state["vectors"]
        turned, ahead = (left.mT @ x @ right for x in (grad, state["exp_avg"]))
        return left @ adam(state, turned, ahead, group) @ right.mT


def update_factors_(state: dict[str, Any], grad: Tensor, beta2: float) -> None:
    """Average both factors and decompose them; each learns through the other's inverse."""
    left, right = (
        vectors * values.rsqrt()
        for vectors, values in zip(state["vectors"], state["values"], strict=True)
    )
    for factor, whitened in zip(state["factors"], (grad @ right, grad.mT @ left), strict=True):
        factor.lerp_(whitened @ whitened.mT / whitened.shape[1], 1 - beta2)
    found = [torch.linalg.eigh(factor) for factor in state["factors"]]
    state["values"] = [values.clamp_min(LEAST * values[-1]) for values, _ in found]
    state["vectors"] = [vectors for _, vectors in found]


def adam(state: dict[str, Any], grad: Tensor, exp_avg: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's update by a first moment, both moments' bias corrected."""
    beta1, beta2 = group["betas"]
    square = state.setdefault("exp_avg_sq", torch.zeros_like(grad))
    square.lerp_(grad.square(), 1 - beta2)
    root = (square / (1 - beta2 ** state["step"])).sqrt()
    return exp_avg / (1 - beta1 ** state["step"]) / (root + group["eps"])
