"""A plain training loop: batches of any size, micro-batches, GradScaler, evaluation between.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

from rootfree_fused import BatchSizeCounter, RootFreeRMSprop


def main() -> list[float]:
    """Train for four steps; return the batch size of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = RootFreeRMSprop(model.parameters(), lr=1e-2, momentum=0.9, batch_size=1)
    # Under torchrun wrap the model in DistributedDataParallel and give the counter the wrapper.
    counter = BatchSizeCounter(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    x, labels = torch.randn(100, 8), torch.randint(3, (100,))
    batch_sizes = []
    for batch in torch.arange(100).split(32):  # the last batch has 4 samples
        model.train()
        micro_batches = batch.split(16)
        for micro_batch in micro_batches:
            loss = nn.functional.cross_entropy(model(x[micro_batch]), labels[micro_batch])
            scaler.scale(loss / len(micro_batches)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        batch_sizes.append(optimizer.param_groups[0]["batch_size"])
        model.eval()
        with torch.no_grad():
            model(x)  # does not count
    counter.remove()
    return batch_sizes


if __name__ == "__main__":
    print("batch sizes:", main())
