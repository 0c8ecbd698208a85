"""accelerate: micro-batches by `accelerator.accumulate`, counted over all ranks.

pip install accelerate && accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rootfree_fused import RootFreeAdamW
from rootfree_fused.integrations.accelerate import prepare


def main() -> tuple[list[float], list[float]]:
    """Train for ten epochs of 2 x 16 + 2 x 16 + 4 samples a rank.

    Returns the batch size of each step and the loss of each micro-batch.
    """
    torch.manual_seed(0)
    x = torch.randn(68, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = RootFreeAdamW(model.parameters(), batch_size="counted")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    batch_sizes, losses = [], []
    for _ in range(10):
        for batch, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                batch_sizes.append(optimizer.param_groups[0]["batch_size"])
    return batch_sizes, losses


if __name__ == "__main__":
    for name, values in zip(("batch sizes:", "losses:"), main(), strict=True):
        print(name, *(f"{value:.3g}" for value in values))
