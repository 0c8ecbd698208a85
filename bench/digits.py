"""The training problem: scikit-learn's handwritten digits and a small CNN.

Real data: 1,797 images of 8 x 8, split once and stratified into 70 % training and 30 % test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from .common import optional

BATCH = 64  # the last, smaller batch of an epoch is dropped, so that batch_size stays true

Set = tuple[Tensor, Tensor]  # images (n, 1, 8, 8) in [0, 1], labels (n,)


# Data and model -------------------------------------------------------------------------------


def load_digits(device: torch.device, *, tuning: bool) -> tuple[Set, Set]:
    """Training and test images; for tuning four fifths and one fifth of the training images."""
    images, labels = optional("sklearn.datasets").load_digits(return_X_y=True)
    split = optional("sklearn.model_selection").train_test_split
    kept, held_out = split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    if tuning:
        kept, held_out = split(kept, test_size=0.2, stratify=labels[kept], random_state=0)
    x = torch.tensor(images, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, device=device)
    return (x[kept], y[kept]), (x[held_out], y[held_out])


def build_model(seed: int) -> nn.Module:
    """21,546 parameters in 8 tensors; 8 x 8 images."""
    torch.manual_seed(seed)
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


# Training -------------------------------------------------------------------------------------


@dataclass
class Run:
    """One network in training, and what was measured: a value an epoch, seconds a step."""

    model: nn.Module
    optimizer: Optimizer
    schedule: CosineAnnealingLR
    training_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    optimizer_step: list[float] = field(default_factory=list)
    training_step: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step; returns the loss before it."""
        start = _now(x.device)
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x), y)
        loss.backward()
        before = _now(x.device)
        self.optimizer.step()
        end = _now(x.device)
        self.schedule.step()
        self.optimizer_step.append(end - before)
        self.training_step.append(end - start)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> None:
        """Append loss and accuracy on held-out images."""
        logits = self.model(x)
        self.held_out_loss.append(functional.cross_entropy(logits, y).item())
        self.accuracy.append((logits.argmax(dim=1) == y).double().mean().item())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    optimizers: dict[str, Callable[[nn.Module], Optimizer]],
    train_set: Set,
    held_out: Set,
    *,
    seed: int,
    epochs: int,
    progress: Callable[[], object],
) -> dict[str, Run]:
    """Train one network an optimizer, all from the same weights on the same batches.

    They take their steps in turn, so that noise falls on the times of all alike. The learning rate
    follows a cosine to 0 over all steps.
    """
    x, y = train_set
    batches = len(y) // BATCH
    runs = {}
    for name, build in optimizers.items():
        model = build_model(seed).to(x.device)
        optimizer = build(model)
        runs[name] = Run(model, optimizer, CosineAnnealingLR(optimizer, epochs * batches))

    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator).to(x.device)
        totals = dict.fromkeys(runs, 0.0)
        for batch in order[: batches * BATCH].split(BATCH):
            for name, run in runs.items():
                totals[name] += run.step(x[batch], y[batch])
        for name, run in runs.items():
            run.training_loss.append(float(totals[name]) / batches)
            run.evaluate(*held_out)
        progress()
    return runs
