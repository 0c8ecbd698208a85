"""The parameters of well-known networks, and the products that train them.

A layer that is multiplied at so many `positions` of a sample takes 6 FLOP a parameter and position
in a forward and backward: three products of the weight's size. Convolutions are the products of
their unfolded inputs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..measuring.common import Call, Shape


@dataclass(frozen=True)
class Layer:
    """A parameter, and how often a sample is multiplied by it: never for vectors and lookups."""

    shape: Shape
    positions: int = 0

    @property
    def matrix(self) -> Shape:
        """The shape as Shampoo sees it: first axis, all others; a vector stays one."""
        if len(self.shape) < 2:
            return self.shape
        return self.shape[0], math.prod(self.shape[1:])


def resnet50(width: int = 64, size: int = 224) -> Iterator[Layer]:
    """The 161 parameters (25,557,032 elements) of torchvision's ResNet-50, in its order."""
    side = size // 2
    yield from (Layer((width, 3, 7, 7), side**2), Layer((width,)), Layer((width,)))
    channels, side = width, side // 2
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for block in range(blocks):
            before, side = side, side // 2 if block == 0 and stage > 0 else side
            convolutions = [
                Layer((inner, channels, 1, 1), before**2),
                Layer((inner, inner, 3, 3), side**2),
                Layer((4 * inner, inner, 1, 1), side**2),
            ]
            if block == 0:
                convolutions.append(Layer((4 * inner, channels, 1, 1), side**2))
            for layer in convolutions:
                yield from (layer, Layer(layer.shape[:1]), Layer(layer.shape[:1]))
            channels = 4 * inner
    yield from (Layer((1000, channels), 1), Layer((1000,)))


def _affine(rows: int, columns: int, positions: int) -> Iterator[Layer]:
    yield from (Layer((rows, columns), positions), Layer((rows,)))


def _block(width: int, positions: int) -> Iterator[Layer]:
    """A transformer layer with biases: norm, attention, norm, an MLP of 4 widths."""
    yield from (Layer((width,)), Layer((width,)))
    for rows, columns in ((3 * width, width), (width, width)):
        yield from _affine(rows, columns, positions)
    yield from (Layer((width,)), Layer((width,)))
    for rows, columns in ((4 * width, width), (width, 4 * width)):
        yield from _affine(rows, columns, positions)


def vit_b16(width: int = 768, depth: int = 12) -> Iterator[Layer]:
    """The parameters (86,567,656 elements) of torchvision's ViT-B/16 on 224 x 224 pixels."""
    yield from (Layer((1, 1, width)), Layer((width, 3, 16, 16), 196), Layer((width,)))
    yield Layer((1, 197, width))
    for _ in range(depth):
        yield from _block(width, 197)
    yield from (Layer((width,)), Layer((width,)), *_affine(1000, width, 1))


def vit_l16() -> Iterator[Layer]:
    """The parameters (304,326,632 elements) of torchvision's ViT-L/16 on 224 x 224 pixels."""
    yield from vit_b16(1024, 24)


def gpt2(
    width: int = 768, depth: int = 12, context: int = 1024, words: int = 50257
) -> Iterator[Layer]:
    """The parameters of GPT-2, its head tied to its embedding: 124,439,808 elements if small."""
    yield from (Layer((words, width), context), Layer((context, width)))
    for _ in range(depth):
        yield from _block(width, context)
    yield from (Layer((width,)), Layer((width,)))


def llama_1b(
    width: int = 2048, depth: int = 16, context: int = 2048, words: int = 128256
) -> Iterator[Layer]:
    """The parameters (1,235,814,400 elements) of Llama 3.2 1B, its head tied to its embedding."""
    yield Layer((words, width), context)
    for _ in range(depth):
        yield Layer((width,))
        for rows in (width, width // 4, width // 4, width):
            yield Layer((rows, width), context)
        yield Layer((width,))
        for rows, columns in ((4 * width, width), (4 * width, width), (width, 4 * width)):
            yield Layer((rows, columns), context)
    yield Layer((width,))


def llama_8b(
    width: int = 4096, depth: int = 32, inner: int = 14336, words: int = 128256, context: int = 2048
) -> Iterator[Layer]:
    """The parameters (8,030,261,248 elements) of Llama 3.1 8B; 8 heads of 128 for keys."""
    yield Layer((words, width), context)
    for _ in range(depth):
        yield Layer((width,))
        for rows in (width, 1024, 1024, width):
            yield Layer((rows, width), context)
        yield Layer((width,))
        for rows, columns in ((inner, width), (inner, width), (width, inner)):
            yield Layer((rows, columns), context)
    yield Layer((width,))
    yield Layer((words, width), context)


def llama_70b() -> Iterator[Layer]:
    """The parameters (70,553,706,496 elements) of Llama 3.1 70B."""
    yield from llama_8b(8192, 80, 28672)


def qwen3_30b_a3b_experts(depth: int = 48, experts: int = 128) -> Iterator[Shape]:
    """The experts of Qwen3-30B-A3B as stacks: gate, up and down of each layer."""
    for _ in range(depth):
        yield from ((experts, 768, 2048), (experts, 768, 2048), (experts, 2048, 768))


def qwen3_30b_a3b(
    width: int = 2048, depth: int = 1, experts: int = 32, inner: int = 768, context: int = 2048
) -> Iterator[Layer]:
    """Linear layers of Qwen3-30B-A3B: a slice of its 48 layers, and of the 128 experts of each.

    Of 32 heads of 128 for queries, 4 for keys and values, a router; 8 of 128 experts see a token,
    so each of them every 16th position.
    """
    for _ in range(depth):
        for rows, columns in ((2 * width, width), (width // 4, width), (width // 4, width)):
            yield Layer((rows, columns), context)
        yield from (Layer((width, 2 * width), context), Layer((128, width), context))
        for _ in range(experts):
            for rows, columns in ((inner, width), (inner, width), (width, inner)):
                yield Layer((rows, columns), context // 16)


@dataclass(frozen=True)
class Model:
    """Layers, and the samples of the batch whose forward and backward a step is compared with."""

    layers: list[Layer]
    samples: int

    def flops(self) -> float:
        """FLOPs of a forward and backward in products with weights: 6 a parameter and position."""
        return 6 * self.samples * sum(math.prod(a.shape) * a.positions for a in self.layers)


FULL: dict[str, Callable[[], Model]] = {
    "ResNet-50, 128 images": lambda: Model(list(resnet50()), 128),
    "ViT-B/16, 128 images": lambda: Model(list(vit_b16()), 128),
    "GPT-2 small, 16 x 1024 tokens": lambda: Model(list(gpt2()), 16),
    "GPT-2 medium, 16 x 1024 tokens": lambda: Model(list(gpt2(1024, 24)), 16),
    "Llama 1B, 8 x 2048 tokens": lambda: Model(list(llama_1b()), 8),
    "Qwen3-30B-A3B, 1 of 48 layers, 32 of 128 experts, 8 x 2048 tokens": lambda: Model(
        list(qwen3_30b_a3b()), 8
    ),
}
# For a CPU: fewer and narrower layers in the same proportions, and small batches.
SCALED: dict[str, Callable[[], Model]] = {
    "ResNet-50, width 1/4, 32 images of 64 x 64": lambda: Model(list(resnet50(16, 64)), 32),
    "ViT-B/16, width 1/4, 3 of 12 layers, 16 images": lambda: Model(list(vit_b16(192, 3)), 16),
    "GPT-2 small, width 1/4, 3 of 12 layers, 1024 words, 8 x 256 tokens": lambda: Model(
        list(gpt2(192, 3, 256, 1024)), 8
    ),
    "GPT-2 medium, width 1/4, 6 of 24 layers, 1024 words, 8 x 256 tokens": lambda: Model(
        list(gpt2(256, 6, 256, 1024)), 8
    ),
    "Llama 1B, width 1/8, 4 of 16 layers, 1024 words, 8 x 256 tokens": lambda: Model(
        list(llama_1b(256, 4, 256, 1024)), 8
    ),
}
QUICK: dict[str, Callable[[], Model]] = {
    "GPT-2, width 32, 1 layer, 2 x 64 tokens": lambda: Model(list(gpt2(32, 1, 64, 512)), 2),
}


def forward_backward(model: Model, dtype: torch.dtype, device: torch.device) -> Call:
    """The products of a forward and backward on random numbers, a stand-in for training.

    For a weight W (m, n) at T positions: X W^T, dY W and dY^T X. Attention scores, activations and
    norms are not in it, so that a step's share of it is an upper bound.
    """
    products = Counter(
        (layer.matrix, layer.positions * model.samples) for layer in model.layers if layer.positions
    )
    numbers = functools.partial(torch.randn, dtype=dtype, device=device)
    widest = max(max(shape) * positions for shape, positions in products)
    inputs, outputs = numbers(widest), numbers(widest)  # shared: only one layer is at work
    weights = {shape: numbers(shape) for shape, _ in products}

    def run() -> None:
        for (shape, positions), count in products.items():
            x = inputs[: positions * shape[1]].view(positions, shape[1])
            dy = outputs[: positions * shape[0]].view(positions, shape[0])
            for _ in range(count):
                x @ weights[shape].T
                dy @ weights[shape]
                dy.T @ x

    return run


def split(layers: Iterable[Layer], longest: int) -> tuple[list[Shape], list[Shape]]:
    """Matrices with no axis above `longest`, and all else: vectors, embeddings and heads."""
    matrices, others = [], []
    for layer in layers:
        shape = layer.matrix
        fits = len(shape) == 2 and min(shape) > 1 and max(shape) <= longest and layer.positions
        (matrices if fits else others).append(shape)
    return matrices, others
