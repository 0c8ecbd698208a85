"""RootFreeShampoo in a plain loop: groups, autocast, a schedule of lr, micro-batches.

It needs no batch size and no clipping: no scale of a matrix' gradient matters to it.

python examples/train.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from rootfree_fused import RootFreeShampoo

STEPS = 200


def main() -> tuple[list[float], list[float]]:
    """Train for two hundred steps of two micro-batches; return each step's lr and loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = RootFreeShampoo(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2]},  # biases and gains
        ],
        lr=5e-3,
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS)
    lrs, losses = [], []
    for _ in range(STEPS):
        lrs.append(scheduler.get_last_lr()[0])
        total = 0.0
        for x in torch.randn(2, 64, 8):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # the parameters stay float32
                loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            (loss / 2).backward()
            total += loss.item() / 2
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(total)
    return lrs, losses


if __name__ == "__main__":
    for name, values in zip(("lrs:", "losses:"), main(), strict=True):
        print(name, *(f"{value:.3g}" for value in values))
