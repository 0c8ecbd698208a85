"""The digits problem: scikit-learn's handwritten digits and a small CNN.

Real data: 1,797 images of 8 x 8, split once and stratified into 70 % training and 30 % test.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..measuring.common import optional
from .training import Problem

Set = tuple[Tensor, Tensor]  # images (n, 1, 8, 8) in [0, 1], labels (n,)


class Digits(Problem):
    """A round is an epoch; its smaller last batch is dropped, so that batch_size stays true."""

    name = "digits"
    batch_size = 64
    rounds = 30
    warm_up = 0.0
    metric = "test loss"
    unit = "nat"
    needs = ("sklearn", "pytorch_optimizer")
    threads = 1

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Set, Set]:
        """Training and test images; for tuning four and one fifths of the training images."""
        images, labels = optional("sklearn.datasets").load_digits(return_X_y=True)
        split = optional("sklearn.model_selection").train_test_split
        kept, held_out = split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
        if tuning:
            kept, held_out = split(kept, test_size=0.2, stratify=labels[kept], random_state=0)
        x = torch.tensor(images, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels, device=device)
        return (x[kept], y[kept]), (x[held_out], y[held_out])

    def build_model(self) -> nn.Module:
        """21,546 parameters in 8 tensors; 8 x 8 images."""
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def batches(self, data: Set, generator: torch.Generator) -> Iterator[Set]:
        """An epoch in random order."""
        x, y = data
        order = torch.randperm(len(y), generator=generator).to(y.device)
        for batch in order[: len(y) // self.batch_size * self.batch_size].split(self.batch_size):
            yield x[batch], y[batch]

    def loss(self, model: nn.Module, batch: Set) -> Tensor:
        """Cross-entropy, mean over the images."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, held_out: Set) -> dict[str, float]:
        """Loss in nat and accuracy as a share of the images."""
        x, y = held_out
        logits = model(x)
        accuracy = (logits.argmax(dim=1) == y).double().mean().item()
        return {"loss": functional.cross_entropy(logits, y).item(), "accuracy": accuracy}
