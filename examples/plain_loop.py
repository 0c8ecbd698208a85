"""A plain training loop: batches of any size, micro-batches, GradScaler, evaluation between.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

from rootfree_fused import BatchSizeCounter, RootFreeRMSprop


def main() -> tuple[list[float], list[float]]:
    """Train for ten epochs of four steps; return each step's batch size and each epoch's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = RootFreeRMSprop(model.parameters(), batch_size=32)
    # Under torchrun wrap the model in DistributedDataParallel and give the counter the wrapper.
    counter = BatchSizeCounter(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.randn(100, 8)
    labels = x[:, :3].argmax(1)
    batch_sizes, losses = [], []
    for batch in 10 * torch.arange(100).split(32):  # the last batch of an epoch has 4 samples
        model.train()
        micro_batches = batch.split(16)
        for micro_batch in micro_batches:
            loss = nn.functional.cross_entropy(model(x[micro_batch]), labels[micro_batch])
            scaler.scale(loss / len(micro_batches)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        batch_sizes.append(optimizer.param_groups[0]["batch_size"])
        if len(batch) < 32:
            model.eval()
            with torch.no_grad():  # does not count
                losses.append(nn.functional.cross_entropy(model(x), labels).item())
    counter.remove()
    return batch_sizes, losses


if __name__ == "__main__":
    for name, values in zip(("batch sizes:", "loss after each epoch:"), main(), strict=True):
        print(name, *(f"{value:.3g}" for value in values))
