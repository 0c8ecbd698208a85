"""Stand-ins for vision transformers on patches of the digits: attention or focal modulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from .workload import OnDigits

WIDTH, LAYERS, HEADS = 48, 3, 4
SIDE = 4  # patches of an image in a row


class Attention(nn.Module):
    """Every patch sees all: (n, patches, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(*heads.chunk(3, dim=1))
        return self.projection(seen.transpose(1, 2).flatten(-2))


class FocalModulation(nn.Module):
    """Depth-wise convolutions of growing size, each gated, and the mean modulate a query.

    Yang, Li, Dai and Gao, "Focal Modulation Networks", arXiv 2203.11926.
    """

    def __init__(self, width: int, sizes: tuple[int, ...] = (3, 5)) -> None:
        super().__init__()
        self.parts = (width, width, len(sizes) + 1)
        self.start = nn.Linear(width, sum(self.parts))
        self.levels = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width, bias=False)
            for size in sizes
        )
        self.modulator = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.start(x).split(self.parts, dim=-1)
        context = context.mT.unflatten(-1, (SIDE, SIDE))
        gates = gates.mT.unflatten(-1, (SIDE, SIDE)).unsqueeze(2)
        gathered = torch.zeros_like(context)
        for i, level in enumerate(self.levels):
            context = functional.gelu(level(context))
            gathered = gathered + context * gates[:, i]
        overall = functional.gelu(context.mean((-2, -1), keepdim=True))
        gathered = gathered + overall * gates[:, -1]
        return self.projection(query * self.modulator(gathered.flatten(-2).mT))


class Block(nn.Module):
    """A mixer of patches and an MLP of four widths, each behind a layer norm."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.LayerNorm(width), mixer)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Patches with learned positions, blocks, and ten logits of their mean."""

    def __init__(self, mixer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(SIDE**2, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, mixer(WIDTH)) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) images to (n, 10) logits."""
        x = self.patches(images).flatten(2).mT + self.position
        return self.head(self.blocks(x).mean(1))


WORKLOADS = [
    OnDigits("digits_vit", partial(Transformer, Attention), rounds=30, warm_up=0.1),
    OnDigits("digits_focal", partial(Transformer, FocalModulation), rounds=30, warm_up=0.02),
]
