"""The autoencoder problem: the digits' images through eight numbers, a classic of second order.

Hinton and Salakhutdinov, 2006, and Martens, 2010, in small: a deep and narrow network with tanh,
which optimizers of first order fit slowly. What counts is the training loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..measuring.common import optional
from .training import Problem

SIZES = (64, 48, 24, 8, 24, 48, 64)
STEPS_A_ROUND = 30


class Autoencoder(Problem):
    """A round is 30 batches of images in random order; all images are trained on, and evaluated."""

    name = "autoencoder"
    batch_size = 128
    rounds = 20
    warm_up = 0.1
    metric = "loss on all images"
    unit = "squared error"
    needs = ("sklearn", "pytorch_optimizer")
    threads = 1

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Tensor, Tensor]:
        """The 1,797 images twice: the loss on them is the aim, in tuning by other seeds."""
        images, _ = optional("sklearn.datasets").load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32, device=device) / 16
        return x, x

    def build_model(self) -> nn.Module:
        """9,000 parameters in 12 tensors."""
        layers: list[nn.Module] = []
        for sizes in pairwise(SIZES):
            layers += [nn.Linear(*sizes), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def batches(self, data: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Each of different images."""
        for _ in range(STEPS_A_ROUND):
            chosen = torch.randperm(len(data), generator=generator)[: self.batch_size]
            yield data[chosen.to(data.device)]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Squared error of an image, summed over its pixels, mean over the images."""
        return (model(batch) - batch).square().sum(1).mean()

    def evaluate(self, model: nn.Module, held_out: Tensor) -> dict[str, float]:
        """The loss on all images."""
        return {"loss": self.loss(model, held_out).item()}
