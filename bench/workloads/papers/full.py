"""The published workloads at their size: timm's models on CIFAR-100 and ImageWoof, in bfloat16.

Recipes are those of the code of arXiv 2402.03496, as far as it says: epochs, schedules, warm-up,
clipping, augmentation, label smoothing, drop path; the forward pass in bfloat16 by autocast, the
parameters float32. The data lies in a folder that the user names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...measuring.common import optional
from . import augment, data
from .workload import STEPS, Classification, Loss, Set, squared_loss

# Mean and deviation of each colour, of pixels in [0, 1].
OF_CIFAR = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMOOTHED = partial(functional.cross_entropy, label_smoothing=0.1)


class Full(Classification):
    """A round is an epoch; a tenth of the training images is held out for tuning."""

    batch_size = 128
    autocast = True
    extras = "bench,timm"
    colours: tuple[tuple[float, ...], tuple[float, ...]]

    def __init__(self, name: str, *args: Any, published: str | None = None, **kwargs: Any) -> None:
        super().__init__(name, *args, **kwargs)
        self.published = published

    def read(self, part: str) -> Set:
        """All images of "train" or "test"."""
        raise NotImplementedError

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A batch as it is trained on, still uint8."""
        raise NotImplementedError

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Set, Set]:
        """Images as bytes; SystemExit, with the cure, where a package or the data is missing."""
        if missing := self.missing():
            raise SystemExit(f"{self.name}: {missing}")
        train_set = self.read("train")
        sets = data.divided(train_set) if tuning else (train_set, self.read("test"))
        (x, y), (held_x, held_y) = sets
        return (x.to(device), y.to(device)), (held_x.to(device), held_y.to(device))

    def batches(self, data: Set, generator: torch.Generator) -> Iterator[Set]:
        """An epoch in random order; its smaller last batch is dropped."""
        x, y = data
        order = torch.randperm(len(y), generator=generator).to(y.device)
        for batch in order[: len(y) // self.batch_size * self.batch_size].split(self.batch_size):
            yield self.augmented(x[batch], generator), y[batch]

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        mean, deviation = torch.tensor(self.colours, device=images.device)[:, :, None, None]
        return super()._logits(model, (images / 255 - mean) / deviation)


class Cifar100(Full):
    """32 x 32 images of 100 classes, shifted by up to 4 pixels and turned."""

    needs = ("timm", "torchvision", "numpy")
    needs_data = data.CIFAR
    files = ("cifar-100-python/train", "cifar-100-python/test")
    colours = OF_CIFAR

    def read(self, part: str) -> Set:
        """CIFAR-100's training or test images."""
        return data.cifar100(self.folder, part)

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shifted and turned."""
        return augment.shifted(images, generator)


class ImageWoof(Full):
    """224 x 224 images of ten breeds of dogs."""

    needs = ("timm", "torchvision", "PIL")
    needs_data = data.IMAGEWOOF
    files = ("train", "val")
    colours = OF_IMAGENET

    def read(self, part: str) -> Set:
        """ImageWoof's training or validation images, 256 x 256; the latter are the test here."""
        return data.imagewoof(self.folder, "val" if part == "test" else part)

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random part of each, turned, its colours changed, and a rectangle of noise."""
        parts = augment.resized_crops(images, generator)
        return augment.erased(augment.jittered(parts, generator), generator)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        border = (images.shape[-1] - 224) // 2
        inner = slice(border, border + 224)
        return super()._logits(model, images[..., inner, inner])


# Models ---------------------------------------------------------------------------------------


def timm_model(name: str, classes: int, **settings: Any) -> nn.Module:
    """By timm's name, its weights drawn anew."""
    return optional("timm", extra="timm").create_model(name, num_classes=classes, **settings)


def _stem() -> nn.Module:
    return nn.Conv2d(3, 64, 3, padding=1, bias=False)


def vgg16_bn() -> nn.Module:
    """The convolutions, the mean over positions, and one linear layer."""
    model = timm_model("vgg16_bn", 100)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(512, 100)
    return model


def resnet(name: str) -> nn.Module:
    """With a first convolution of 3 x 3 and stride 1, and no pooling after it."""
    model = timm_model(name, 100)
    model.conv1, model.maxpool = _stem(), nn.Identity()
    return model


def densenet121() -> nn.Module:
    """With a first convolution of 3 x 3 and stride 1, and no pooling after it."""
    model = timm_model("densenet121", 100)
    model.features.conv0, model.features.pool0 = _stem(), nn.Identity()
    return model


def convmixer() -> nn.Module:
    """ConvMixer-256/12, kernels of 5 x 5 on patches of 2 x 2, as in the published code."""
    build = optional("timm.models.convmixer").ConvMixer
    return build(256, 12, kernel_size=5, patch_size=2, num_classes=100)


def _cifar(
    name: str,
    network: Callable[[], nn.Module],
    epochs: int,
    published: str | None,
    criterion: Loss = functional.cross_entropy,
    unit: str = "nat",
) -> Cifar100:
    return Cifar100(
        f"cifar_{name}",
        network,
        rounds=epochs,
        schedule=STEPS,
        criterion=criterion,
        unit=unit,
        published=published,
    )


def _imagewoof(
    name: str, model: str, epochs: int, warm_up: int, drop_path: float, **settings: Any
) -> ImageWoof:
    return ImageWoof(
        f"imagewoof_{name}",
        partial(timm_model, model, 10, drop_path_rate=drop_path),
        rounds=epochs,
        warm_up=warm_up / epochs,
        training_criterion=SMOOTHED,
        **settings,
    )


# The epochs of ConvMixer are not published: those of the other CNNs.
WORKLOADS = [
    _cifar("vgg16_bn", vgg16_bn, 210, "vgg16_bn"),
    _cifar("resnet34", partial(resnet, "resnet34"), 210, "resnet34"),
    _cifar("densenet121", densenet121, 210, "densenet121"),
    _cifar("resnet50", partial(resnet, "resnet50"), 120, "resnet50"),
    _cifar(
        "resnet50_squared",
        partial(resnet, "resnet50"),
        120,
        "resnet50-mse",
        squared_loss,
        "squared error",
    ),
    _cifar("convmixer", convmixer, 210, None),
    _imagewoof("swin", "swin_tiny_patch4_window7_224", 300, 30, 0.2, published="SwinT"),
    _imagewoof("focalnet", "focalnet_tiny_srf", 300, 5, 0.1, published="FocalNet"),
    _imagewoof("gcvit", "gcvit_xxtiny", 310, 20, 0.2, clip=5.0, published="GCViT"),
]
