"""A small model, its optimizer and a counter between them."""

from __future__ import annotations

import torch
from helpers.optimizers import build
from torch import nn
from torch.utils.checkpoint import checkpoint

from rootfree_fused import BatchSizeCounter


class Net(nn.Module):
    """A classifier that can recompute its hidden layer in the backward."""

    def __init__(self, recompute=None):
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.recompute = recompute

    def forward(self, x, labels=None):
        if self.recompute is None:
            h = self.hidden(x)
        else:
            h = checkpoint(self.hidden, x, use_reentrant=self.recompute)
        logits = self.last(h.tanh())
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


def batch(samples, seed=0):
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))


def setup(name="adamw", recompute=None, **options):
    torch.manual_seed(0)
    model = Net(recompute)
    optimizer = build(name, model.parameters(), batch_size=1)
    return model, optimizer, BatchSizeCounter(model, optimizer, **options)


def batch_sizes(optimizer):
    return [group["batch_size"] for group in optimizer.param_groups]
