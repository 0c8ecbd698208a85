"""Convolutional stand-ins on the digits: VGG, ResNet, DenseNet and ConvMixer in small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .workload import STEPS, OnDigits, squared_loss


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3, and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


def head(channels: int) -> list[nn.Module]:
    """The mean over positions, and ten logits."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def vgg() -> nn.Module:
    """Four convolutions with batch norm, 16, 16, 32 and 32 channels, and one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [convolution(inputs, outputs), nn.ReLU(), convolution(outputs, outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class BasicBlock(nn.Module):
    """Two convolutions beside a path that is linear."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride)
        self.second = convolution(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(functional.relu(self.first(x)))
        return functional.relu(inner + self.shortcut(x))


def resnet() -> nn.Module:
    """A stem and three basic blocks, 16, 32 and 32 channels."""
    blocks = [BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 32, 1)]
    return nn.Sequential(convolution(1, 16), nn.ReLU(), *blocks, *head(32))


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a convolution, whose channels join the input's."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.convolution = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.convolution(functional.relu(self.norm(x)))], dim=1)


def densenet(growth: int = 8, layers: int = 4) -> nn.Module:
    """Two dense blocks, between them half of the channels and of each side."""
    parts: list[nn.Module] = [nn.Conv2d(1, 2 * growth, 3, padding=1, bias=False)]
    channels = 2 * growth
    for block in range(2):
        if block:
            parts += [nn.BatchNorm2d(channels), nn.ReLU()]
            parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        parts += [DenseLayer(channels + i * growth, growth) for i in range(layers)]
        channels += layers * growth
    return nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU(), *head(channels))


class Residual(nn.Module):
    """A function added to its input."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def convmixer(width: int = 32, depth: int = 4) -> nn.Module:
    """Patches of 2 x 2; layers of a depth-wise 3 x 3 and a 1 x 1 convolution."""

    def normed(layer: nn.Module) -> list[nn.Module]:
        return [layer, nn.GELU(), nn.BatchNorm2d(width)]

    layers = normed(nn.Conv2d(1, width, 2, 2))
    for _ in range(depth):
        layers.append(Residual(*normed(nn.Conv2d(width, width, 3, padding=1, groups=width))))
        layers += normed(nn.Conv2d(width, width, 1))
    return nn.Sequential(*layers, *head(width))


WORKLOADS = [
    OnDigits("digits_vgg", vgg, rounds=60, schedule=STEPS),
    OnDigits("digits_resnet", resnet, rounds=45, schedule=STEPS),
    OnDigits(
        "digits_resnet_squared",
        resnet,
        rounds=45,
        schedule=STEPS,
        criterion=squared_loss,
        unit="squared error",
    ),
    OnDigits("digits_densenet", densenet, rounds=60, schedule=STEPS),
    OnDigits("digits_convmixer", convmixer, rounds=60),
]
