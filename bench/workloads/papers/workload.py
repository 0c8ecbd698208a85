"""What a workload is: a problem that says which packages and data it needs, and what is missing.

Classification is what most of them are, on the digits of scikit-learn where nothing is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from ..digits import Digits
from ..training import Data, Problem, Schedule

Set = tuple[Tensor, Tensor]  # images (n, channels, height, width), labels (n,)
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (n, classes) and labels, mean over them
STEPS: Schedule = ("steps", (1 / 3, 2 / 3), 0.1)  # of the published CNNs
CHUNK = 512  # images that are evaluated at once


class Workload(Problem):
    """A problem of a paper, or a small one in its place."""

    metric = "test loss"
    unit = "nat"
    warm_up = 0.0
    threads = 1
    extras = "bench"  # of this package, which bring what it needs
    published: str | None = None  # the model's name among the published search spaces
    needs_data: str | None = None  # what has to lie in the folder that `with_data` takes
    files: tuple[str, ...] = ()  # paths there without which nothing can be read
    folder: Path | None = None

    def with_data(self, folder: Path | str | None) -> Self:
        """The same workload on the data in a folder; itself where it needs none."""
        if self.needs_data is None or folder is None:
            return self
        other = copy.copy(self)
        other.folder = Path(folder)
        return other

    def missing(self) -> str | None:
        """Why it cannot be trained here, and the cure; None where it can."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if absent:
            return f"no {' and no '.join(absent)}; pip install rootfree-fused[{self.extras}]"
        if self.needs_data is None:
            return None
        cure = f"pass --data DIR, a folder with {self.needs_data}"
        if self.folder is None:
            return f"no data; {cure}"
        unread = [path for file in self.files if not (path := self.folder / file).exists()]
        return f"no {' and no '.join(map(str, unread))}; {cure}" if unread else None

    def training_part(self, train_set: Data) -> Data:
        """Training data as `evaluate` takes it, for the accuracy on what was learnt."""
        return train_set


class Classification(Workload):
    """Images in classes; the loss is a mean over images."""

    autocast = False

    def __init__(
        self,
        name: str,
        network: Callable[[], nn.Module],
        *,
        rounds: int,
        warm_up: float = 0.0,
        schedule: Schedule = "cosine",
        clip: float | None = None,
        criterion: Loss = functional.cross_entropy,
        training_criterion: Loss | None = None,
        unit: str = "nat",
    ) -> None:
        self.name, self.rounds, self.unit = name, rounds, unit
        self.warm_up, self.schedule, self.clip = warm_up, schedule, clip
        self._network, self._criterion = network, criterion
        self._training_criterion = training_criterion or criterion

    def build_model(self) -> nn.Module:
        """The network, its logits (n, classes)."""
        return self._network()

    def loss(self, model: nn.Module, batch: Set) -> Tensor:
        """Mean over the images."""
        return self._training_criterion(self._logits(model, batch[0]), batch[1])

    def evaluate(self, model: nn.Module, held_out: Set) -> dict[str, float]:
        """Loss, without label smoothing, and accuracy as a share of the images."""
        parts = [self._logits(model, x) for x in held_out[0].split(CHUNK)]
        logits, labels = torch.cat(parts), held_out[1]
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        return {"loss": self._criterion(logits, labels).item(), "accuracy": accuracy}

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            return model(images).float()


class OnDigits(Classification):
    """The 8 x 8 digits of scikit-learn, split and batched as in the digits problem."""

    batch_size = Digits.batch_size
    needs = ("sklearn",)

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Set, Set]:
        """Training and test images; for tuning four and one fifths of the training images."""
        return Digits().load(device, tuning=tuning)

    def batches(self, data: Set, generator: torch.Generator) -> Iterator[Set]:
        """An epoch in random order."""
        return Digits().batches(data, generator)


def squared_loss(logits: Tensor, labels: Tensor, *, k: float = 15**0.5, m: float = 30.0) -> Tensor:
    """Mean over images and classes of (z_c - M y_c)^2, at the right class times k^2.

    The rescaled squared loss of Hui and Belkin, "Evaluation of Neural Architectures Trained with
    Square Loss vs Cross-Entropy in Classification Tasks", arXiv 2006.07322; their k is k^2 here, as
    in the code of arXiv 2402.03496.
    """
    right = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return ((logits - m * right) * (1 + (k - 1) * right)).square().mean()
