"""Random changes of images for training, on uint8 batches (n, 3, height, width).

A CPU's generator draws, so that a seed means the same changes on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

GRAY = (0.299, 0.587, 0.114)


def shifted(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Each by up to `pad` pixels in both directions, zeros from outside, and every other turned."""
    n, _, high, wide = images.shape
    padded = functional.pad(images, (pad,) * 4)
    down, right = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(high), right + torch.arange(wide)
    turned = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(turned, columns.flip(1), columns)
    of = torch.arange(n)[:, None, None].to(images.device)
    rows, columns = (i.to(images.device) for i in (rows[:, :, None], columns[:, None, :]))
    return padded.permute(0, 2, 3, 1)[of, rows, columns].permute(0, 3, 1, 2).contiguous()


def resized_crops(images: Tensor, generator: torch.Generator, side: int = 224) -> Tensor:
    """Of each a random part of 8 to 100 % of its area, 3:4 to 4:3, every other one turned."""
    n = len(images)
    area = torch.empty(n).uniform_(0.08, 1.0, generator=generator)
    limit = math.log(4 / 3)
    ratio = torch.empty(n).uniform_(-limit, limit, generator=generator).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = 2 * torch.rand(2, n, generator=generator) - 1
    sign = 1 - 2 * torch.randint(2, (n,), generator=generator)
    zero = torch.zeros(n)
    rows = [sign * wide, zero, x * (1 - wide), zero, high, y * (1 - high)]
    theta = torch.stack(rows, dim=1).view(n, 2, 3).to(images.device)
    grid = functional.affine_grid(theta, [n, 3, side, side], align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False).round().byte()


def jittered(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast and saturation of each by factors of 1 +- `strength`."""
    factors = torch.empty(3, len(images), 1, 1, 1)
    factors = factors.uniform_(1 - strength, 1 + strength, generator=generator)
    brightness, contrast, saturation = factors.to(images.device)
    x = images * brightness
    x = x.clamp(0, 255)
    mean = _gray(x).mean((-2, -1), keepdim=True)
    x = (mean + contrast * (x - mean)).clamp(0, 255)
    gray = _gray(x)
    return (gray + saturation * (x - gray)).clamp(0, 255).round().byte()


def erased(images: Tensor, generator: torch.Generator, probability: float = 0.25) -> Tensor:
    """In a share of them noise in place of a rectangle, 2 to 33 % of the area, 3:10 to 10:3."""
    images = images.clone()
    side = images.shape[-1]
    for i in (torch.rand(len(images), generator=generator) < probability).nonzero().flatten():
        area, ratio, down, right = torch.rand(4, generator=generator).tolist()
        area = (0.02 + (1 / 3 - 0.02) * area) * side**2
        ratio = math.exp((2 * ratio - 1) * math.log(10 / 3))
        high, wide = (min(side, round(math.sqrt(area * r))) for r in (ratio, 1 / ratio))
        top, left = round(down * (side - high)), round(right * (side - wide))
        noise = torch.randint(256, (3, high, wide), generator=generator, dtype=torch.uint8)
        images[i, :, top : top + high, left : left + wide] = noise.to(images.device)
    return images


def _gray(images: Tensor) -> Tensor:
    weights = images.new_tensor(GRAY).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
