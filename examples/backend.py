"""An optimizer of another library, with state of its own, on the functions of rootfree_fused.ops.

docs/backend.md says what of them is stable.

python examples/backend.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rootfree_fused import ops

Update = Callable[..., None]  # a function of rootfree_fused.ops


def start(update: Update, p: Tensor, damping: float) -> dict[str, Any]:
    """State before the first step, by the function's names: a tensor, or one an axis."""
    zeros, ones = torch.zeros_like(p), torch.ones_like(p)
    if update is ops.rmsprop_:
        return {"square_avgs": ones, "momentum_buffers": zeros}
    if update is ops.adamw_:
        return {"exp_avgs": zeros, "exp_avg_sqs": ones}
    eyes = [torch.eye(d, device=p.device)[None] for d in p.shape]  # a bucket of one member
    none, products = [None, None], [torch.empty_like(eye) for eye in eyes]
    matrix = {"residuals": none, "products": products, "momentum_buffers": zeros}
    if update is ops.ifshampoo_:
        return {"factors": eyes, "factor_momenta": [0 * eye for eye in eyes], **matrix}
    grams = [eyes[0].clone(), eyes[1] / (1 + damping)]
    factors = [eyes[0] * (1 + damping) ** -0.5, eyes[1]]
    return {"grams": grams, "factors": factors, "row_square_avgs": p.new_zeros(len(p)), **matrix}


def lists(states: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The state of several parameters as the functions take it: a list a name."""
    joined: dict[str, list[Any]] = {}
    for state in states:
        for key in state.keys() - {"step"}:
            one = state[key] if isinstance(state[key], list) else [state[key]]
            joined.setdefault(key, []).extend(one)
    return joined


class Fused(Optimizer):
    """Steps float32 parameters: by rmsprop_ and adamw_ of all shapes, by the Shampoos matrices."""

    def __init__(self, params: Any, update: Update, **settings: Any) -> None:
        self.update, self.names = update, tuple(settings)
        self.sums: dict[Tensor, Tensor] = {}
        self.micro_batches = 0
        super().__init__(params, settings)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch; a step is on the mean since the last one."""
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        sums = [self.sums.setdefault(p, torch.zeros_like(p)) for p in params]
        ops.accumulate_(sums, [p.grad for p in params])
        self.micro_batches += 1
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group on `.grad`, or on what was accumulated."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            grads = {p: self.sums.get(p, p.grad) for p in group["params"]}
            if not (grads := {p: grad for p, grad in grads.items() if grad is not None}):
                continue
            settings = {key: group[key] for key in self.names}
            for p in grads:
                self.state[p] = self.state[p] or start(self.update, p, settings.get("damping", 0.1))
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
            states = [self.state[p] for p in grads]
            number = partial(torch.tensor, dtype=torch.float32, device=next(iter(grads)).device)
            if self.sums:
                settings["grad_scale"] = number(self.micro_batches)
            if self.update is ops.rootfree_shampoo_:
                settings["steps"] = number([s["step"] for s in states])
            self.update(list(grads), list(grads.values()), **lists(states), **settings)
        self.sums, self.micro_batches = {}, 0
        return loss


def main() -> list[float]:
    """Matrices by root-free Shampoo, biases by root-free AdamW; return the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [
        Fused(matrices, ops.rootfree_shampoo_, lr=5e-3),
        Fused(vectors, ops.adamw_, lr=1e-2, batch_size=128),
    ]
    losses = []
    for _ in range(60):
        total = 0.0
        for x in torch.randn(2, 64, 8):  # micro-batches
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            loss.backward()
            total += loss.item() / 2
            for optimizer in optimizers:
                optimizer.accumulate()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    print("losses", *(f"{loss:.3f}" for loss in main()))
